"""Attention block by block: plain JAX, so it does all that `attend` does on any device, in memory linear in length.

Letters: B batch, L query length, S key length, K kv heads, G queries per kv head, H head size, V that of values.
In the suffix of a name, one block of L or S.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from transformer.attention import HIDDEN, Score, dot, masked_scores
from transformer.masks import Both, Causal, Chunked, Either, Mask, Window
from transformer.positions import Bias
from transformer.remat import ATTENTION_OUTPUT

BLOCK = 512
"""Queries and keys of a block. Own choice: the scores of a block are 1 MiB a head, its products fill a matrix unit,
and a causal mask still empties 47 % of the blocks of 8,192 positions, of the 50 % that can be."""


class _Blocks(NamedTuple):
    """What is known before any number is: the pieces of `attend` that are not arrays, and the sizes of blocks."""

    score: Score
    scale: float
    cap: float | None
    bias: Any  # how bias and mask are made of their arrays
    mask: Any
    size_l: int  # queries of a block
    size_s: int  # keys of a block
    ring: str | None  # the mesh axis around which keys and values travel


class Places(NamedTuple):
    """Where queries and keys stand in their sequences, and which blocks of them meet, in each of R rounds: in one all
    keys are there, in several they come by in turn. Places of what only fills up a block are -1, and so are pairs
    that only fill up a round."""

    queries: Int[Array, " L"]
    keys: Int[Array, "R S"]
    pairs: Int[Array, "R pairs 2"]  # numbers of a query block and of a key block that it may see


class _Inputs(NamedTuple):
    q: Float[Array, "B L K G H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K V"]
    sinks: Float[Array, "K G"] | None
    weights: list[Array]  # learned numbers of the score
    bias: list[Array]
    mask: list[Any]
    places: Places


def blockwise(
    q: Float[Array, "B L K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    *,
    scale: float,
    score: Score = dot,
    bias: Bias | None = None,
    cap: float | None = None,
    sinks: Float[Array, "K G"] | None = None,
    block: int = BLOCK,
) -> Float[Array, "B L K G V"]:
    """`attend` by blocks, with a running maximum m and sum z of every query (Milakov & Gimelshein 2018, alg. 3):

        m' = max(m, max s),  z' = z e^(m - m') + sum e^(s - m'),  out' = out e^(m - m') + e^(s - m') v

    and a backward pass that computes the scores again from log(z) + m (Rabe & Staats 2021; Dao et al. 2022,
    alg. 4): neither holds more than one block of scores. One loop runs over the pairs of blocks that the mask's
    pattern does not empty: under `Causal` half of all, with a window a band. `block`: queries and keys of one.
    """
    L, S = q.shape[1], k.shape[1]
    size_l, size_s = min(block, L), min(block, S)
    places = [padded(jnp.arange(n), 0, size, -1) for n, size in ((L, size_l), (S, size_s))]
    pairs = visible_blocks(mask, -(-L // size_l), size_l, -(-S // size_s), size_s)
    where = Places(places[0], places[1][None], jnp.asarray(pairs)[None])
    # A score's learned numbers are hidden in it: as arguments they get their gradients.
    score, weights = jax.closure_convert(score, q[:, :size_l], k[:, :size_s])
    out, blind = attend_blocks(
        padded(q, 1, size_l), padded(k, 1, size_s), padded(v, 1, size_s), mask, where, sizes=(size_l, size_s),
        scale=scale, score=score, weights=weights, bias=bias, cap=cap, sinks=sinks,
    )  # fmt: skip
    return mean_where(jnp.moveaxis(blind, 3, 1)[:, :L], out[:, :L], v)


def attend_blocks(
    q: Float[Array, "B L K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    places: Places,
    *,
    sizes: tuple[int, int],
    scale: float,
    score: Score,
    weights: list[Array],
    bias: Bias | None,
    cap: float | None,
    sinks: Float[Array, "K G"] | None,
    ring: str | None = None,
) -> tuple[Float[Array, "B L K G V"], Bool[Array, "B K G L"]]:
    """Whole blocks of queries and keys, wherever they stand: the result, and which queries see no key and so have none.

    With `ring`, an axis of a mesh, each round ends with keys and values going to the next device along it (Liu et al.
    2023), and in the backward pass their gradients with them."""
    of_bias, make_bias = jax.tree.flatten(bias)
    of_mask, make_mask = jax.tree.flatten(mask)
    blocks = _Blocks(score, scale, cap, make_bias, make_mask, *sizes, ring)
    inputs = _Inputs(q, k, v, sinks, weights, of_bias, of_mask, places)
    return cast(tuple[Array, Array], _attend(blocks, inputs))


def _logits(
    blocks: _Blocks, pair: Int[Array, "2"], keys: Int[Array, " all_keys"], q: Array, k: Array, x: _Inputs
) -> Float[Array, "B K G L S"]:
    """Scores of a query block with a key block, as in `attend`. What only fills up is hidden."""
    queries, keys = cut(x.places.queries, 0, pair[0], blocks.size_l), cut(keys, 0, pair[1], blocks.size_s)
    inside = (keys >= 0) & (pair[0] >= 0)
    scores_BKGLS = masked_scores(
        q, k, jax.tree.unflatten(blocks.mask, x.mask), (jnp.maximum(queries, 0), jnp.maximum(keys, 0)),
        scale=blocks.scale, cap=blocks.cap, score=lambda q, k: blocks.score(q, k, *x.weights),
        bias=jax.tree.unflatten(blocks.bias, x.bias),
    )  # fmt: skip
    return jnp.where(inside[None, None, None, None], scores_BKGLS, HIDDEN)


def _rounds(blocks: _Blocks, one: Callable[..., Any], state: Any, travels: Any, x: _Inputs) -> tuple[Any, Any]:
    """`one(state, travels, keys, pairs)` for every round, after which what travels goes on to the next device."""
    if blocks.ring is None:
        return one(state, travels, x.places.keys[0], x.places.pairs[0])

    def step(carry: tuple[Any, Any], places: tuple[Array, Array]) -> tuple[tuple[Any, Any], None]:
        state, travels = one(*carry, *places)
        return (state, onwards(travels, blocks.ring)), None

    return jax.lax.scan(step, (state, travels), (x.places.keys, x.places.pairs))[0]


def _forward(blocks: _Blocks, x: _Inputs) -> tuple[Float[Array, "B L K G V"], Float[Array, "B K G L"]]:
    """The result, and log(z) + m of every query; infinity for one that sees no key and so has no result."""
    B, L, K, G, _ = x.q.shape
    size_l, size_s = blocks.size_l, blocks.size_s

    def round_(state: Any, travels: tuple[Array, Array], keys: Array, pairs: Array) -> tuple[Any, Any]:
        k, v = travels

        def step(carry: tuple[Array, ...], pair: Array) -> tuple[tuple[Array, ...], None]:
            i, j = jnp.maximum(pair, 0)
            scores_BKGLS = _logits(blocks, pair, keys, cut(x.q, 1, i, size_l), cut(k, 1, j, size_s), x)
            m, z, out = (cut(part, 3, i, size_l) for part in carry)
            higher = jnp.maximum(m, scores_BKGLS.max(-1))
            fade, weights_BKGLS = jnp.exp(m - higher), jnp.exp(scores_BKGLS - higher[..., None])
            read = jnp.einsum(
                "bkgls,bskv->bkglv",
                weights_BKGLS.astype(v.dtype),
                cut(v, 1, j, size_s),
                preferred_element_type=jnp.float32,
            )
            new = higher, z * fade + weights_BKGLS.sum(-1), out * fade[..., None] + read
            return tuple(paste(all_, part, 3, i, size_l) for all_, part in zip(carry, new, strict=True)), None

        return jax.lax.scan(step, state, pairs)[0], travels

    m, z = jnp.full((B, K, G, L), HIDDEN), jnp.zeros((B, K, G, L))
    if x.sinks is not None:  # as if a key had been read that has this score and no value
        m, z = jnp.broadcast_to(x.sinks.astype(jnp.float32)[None, :, :, None], m.shape), z + 1
    out = jnp.zeros((B, K, G, L, x.v.shape[-1]))
    (m, z, out), _ = _rounds(blocks, round_, (m, z, out), (x.k, x.v), x)
    blind = m == HIDDEN
    z = jnp.where(blind, 1, z)
    return jnp.moveaxis(out / z[..., None], 3, 1).astype(x.v.dtype), jnp.where(blind, jnp.inf, m + jnp.log(z))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(blocks: _Blocks, x: _Inputs) -> tuple[Float[Array, "B L K G V"], Bool[Array, "B K G L"]]:
    out, normalizer = _forward(blocks, x)
    return out, jnp.isinf(normalizer)


def _attend_forward(blocks: _Blocks, x: _Inputs) -> tuple[Any, tuple[_Inputs, Array, Array]]:
    out, normalizer = (checkpoint_name(kept, ATTENTION_OUTPUT) for kept in _forward(blocks, x))
    return (out, jnp.isinf(normalizer)), (x, out, normalizer)


def _attend_backward(blocks: _Blocks, kept: tuple[_Inputs, Array, Array], grads: tuple[Array, Any]) -> tuple[_Inputs]:
    """With weights p and the gradient of the result g: dv = p g; ds = p (g.v - g.out), from which the rest follows
    through the score (Dao et al. 2022, app. B.2). Five products, as in a fused kernel; all sums are float32."""
    x, out, normalizer = kept
    size_l, size_s, d_out = blocks.size_l, blocks.size_s, grads[0]
    expected = jnp.einsum("blkgv,blkgv->bkgl", d_out, out, preferred_element_type=jnp.float32)

    def round_(state: Any, travels: tuple[Array, ...], keys: Array, pairs: Array) -> tuple[Any, Any]:
        k, v, *sums = travels

        def step(carry: tuple[Any, ...], pair: Array) -> tuple[tuple[Any, ...], None]:
            i, j = jnp.maximum(pair, 0)
            d_q, d_learned, d_k, d_v = carry
            d_i, v_j = cut(d_out, 1, i, size_l), cut(v, 1, j, size_s)
            scores_BKGLS, pull = jax.vjp(
                lambda q, k, weights, bias: _logits(blocks, pair, keys, q, k, x._replace(weights=weights, bias=bias)),
                cut(x.q, 1, i, size_l), cut(k, 1, j, size_s), x.weights, x.bias,
            )  # fmt: skip
            weights_BKGLS = jnp.exp(scores_BKGLS - cut(normalizer, 3, i, size_l)[..., None])
            read = jnp.einsum("blkgv,bskv->bkgls", d_i, v_j, preferred_element_type=jnp.float32)
            q_i, k_j, *learned = pull(weights_BKGLS * (read - cut(expected, 3, i, size_l)[..., None]))
            v_j = jnp.einsum(
                "bkgls,blkgv->bskv", weights_BKGLS.astype(d_i.dtype), d_i, preferred_element_type=jnp.float32
            )
            d_learned = jax.tree.map(lambda a, b: a + b.astype(a.dtype), d_learned, tuple(learned))
            return (
                add(d_q, q_i, 1, i, size_l),
                d_learned,
                add(d_k, k_j, 1, j, size_s),
                add(d_v, v_j, 1, j, size_s),
            ), None

        (d_q, d_learned, *sums), _ = jax.lax.scan(step, (*state, *sums), pairs)
        return (d_q, d_learned), (k, v, *sums)

    zero = jax.tree.map(lambda a: jnp.zeros(a.shape), (x.q, (x.weights, x.bias), x.k, x.v))
    (d_q, d_learned), (_, _, d_k, d_v) = _rounds(blocks, round_, zero[:2], (x.k, x.v, *zero[2:]), x)
    sums, inputs = (d_q, d_k, d_v, d_learned), (x.q, x.k, x.v, (x.weights, x.bias))
    d_q, d_k, d_v, (d_weights, d_bias) = jax.tree.map(lambda g, a: g.astype(a.dtype), sums, inputs)
    d_sinks = None
    if x.sinks is not None:  # a key whose value is 0: ds = p (0 - g.out)
        weight = jnp.exp(x.sinks.astype(jnp.float32)[None, :, :, None] - normalizer)
        d_sinks = -(weight * expected).sum((0, 3)).astype(x.sinks.dtype)
    nothing = [None] * len(x.mask), Places(None, None, None)  # type: ignore[arg-type]
    return (_Inputs(d_q, d_k, d_v, d_sinks, d_weights, d_bias, *nothing),)


_attend.defvjp(_attend_forward, _attend_backward)


def visible_blocks(mask: Mask, n_l: int, size_l: int, n_s: int, size_s: int) -> Int[np.ndarray, "pairs 2"]:
    """Pairs of a block of queries and a block of keys, of n of each, that the mask's pattern does not empty, in order.

    >>> visible_blocks(Causal() & Window(2), 3, 4, 3, 4).tolist()
    [[0, 0], [1, 0], [1, 1], [2, 1], [2, 2]]
    """
    return visible_from(mask, np.arange(n_l) * size_l, size_l, np.arange(n_s) * size_s, size_s)


def visible_from(
    mask: Mask, queries: Int[np.ndarray, " n_l"], size_l: int, keys: Int[np.ndarray, " n_s"], size_s: int
) -> Int[np.ndarray, "pairs 2"]:
    """The same of blocks that begin at any places."""
    first_l, first_s = queries[:, None], keys[None, :]
    last_l, last_s = first_l + size_l - 1, first_s + size_s - 1

    def visible(mask: Mask) -> Bool[np.ndarray, "L S"]:
        match mask:
            case Causal():
                return first_s <= last_l
            case Window(size):
                return np.maximum(first_s - last_l, first_l - last_s) < size
            case Chunked(size):
                return (first_l // size <= last_s // size) & (first_s // size <= last_l // size)
            case Both(first, second):
                return visible(first) & visible(second)
            case Either(first, second):
                return visible(first) | visible(second)
        return np.ones((len(queries), len(keys)), bool)  # arrays decide, and they are not known yet

    return np.argwhere(visible(mask)).astype(np.int32)


def mean_where(
    blind: Bool[Array, "#B L #K #G"], out: Float[Array, "B L K G V"], v: Float[Array, "B S K V"]
) -> Float[Array, "B L K G V"]:
    """`out`, but the mean of v for queries that see no key, as `attend` has it."""
    mean = v.astype(jnp.float32).mean(1).astype(v.dtype)[:, None, :, None]
    return jnp.where(blind[..., None], mean, out)


def padded(x: Array, axis: int, multiple: int, value: int = 0) -> Array:
    """x with `value` behind its end, up to a multiple."""
    missing = -x.shape[axis] % multiple
    widths = [(0, missing if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value) if missing else x


def onwards(travels: Any, ring: str | None) -> Any:
    """A tree of arrays, each gone to the next device along an axis of the mesh."""
    n = jax.lax.axis_size(ring)
    return jax.tree.map(lambda t: jax.lax.ppermute(t, ring, [(i, (i + 1) % n) for i in range(n)]), travels)


def cut(x: Array, axis: int, i: Array, size: int) -> Array:
    """The i-th part of so many along an axis."""
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)


def paste(x: Array, part: Array, axis: int, i: Array, size: int) -> Array:
    """x with its i-th part replaced."""
    return jax.lax.dynamic_update_slice_in_dim(x, part, i * size, axis)


def add(x: Array, part: Array, axis: int, i: Array, size: int) -> Array:
    """x with its i-th part increased, in x's dtype."""
    return paste(x, cut(x, axis, i, size) + part.astype(x.dtype), axis, i, size)
