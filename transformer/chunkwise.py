"""Attention over a split sequence by a fused kernel, one chunk of queries and one of keys a call.

A kernel knows no places: it sees all of its keys, or those up to its query. In chunks that is enough. Under a causal
mask device d of C has query chunks d and 2C - 1 - d of 2C, and whatever d is, they meet two chunks of keys at their
own places, causally, and 2C - 1 chunks that lie before them, wholly: all devices call the same kernels as often.
Without a mask one call takes all there is.

What the calls return is joined by their normalizers; backward each is told the normalizer and the result of all keys,
and gradients add up, both in float32 (Liu et al. 2023; Zhu 2024, ring-flash-attention, `zigzag`).

Letters: B batch, L query length, S key length, N query heads, K kv heads, H head size; R rounds, C devices.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from transformer.blockwise import add, cut, onwards, paste
from transformer.remat import ATTENTION_OUTPUT
from transformer.sharding import context_order, keys_by_round


class Kernel(NamedTuple):
    """Two functions with the arguments and results of those in `cudnn_calls.py`."""

    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., tuple[Array, Array, Array]]


class Meetings(NamedTuple):
    """Numbers of a chunk of queries and of a chunk of keys that meet: in the first round, where own keys are there, at
    the same places and wholly; in the rounds after, wholly."""

    same: Int[Array, "n_same 2"]
    whole: Int[Array, "n_whole 2"]
    later: Int[Array, "R-1 n_later 2"]


class _Chunks(NamedTuple):
    kernel: Kernel
    scale: float
    size_l: int  # queries of a chunk
    size_s: int  # keys of a chunk
    ring: str | None  # the mesh axis around which keys and values travel


class _Inputs(NamedTuple):
    q: Float[Array, "B L N H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    meetings: Meetings


def meetings_of(C: int, *, causal: bool, ring: bool) -> Meetings:
    """Every device's, devices in front. Without a mask all that is there is one chunk.

    >>> meetings_of(2, causal=True, ring=False).whole.tolist()
    [[[1, 0], [1, 2], [1, 3]], [[0, 0], [1, 0], [1, 2]]]
    """
    if not causal:
        once = np.zeros((C, 1, 2), np.int32)
        later = np.zeros((C, C - 1 if ring else 0, 1, 2), np.int32)
        return Meetings(once[:, :0], once, later)  # type: ignore[arg-type]  # numbers, not yet arrays
    chunks = context_order(2 * C, C).reshape(C, 2)
    same, before = [], []
    for device, own in enumerate(chunks):
        rounds = keys_by_round(chunks, device, ring=ring)
        same.append(np.argwhere(own[:, None] == rounds[0]))
        before.append([np.argwhere(own[:, None] > keys) for keys in rounds])
    first, *later = (np.asarray(pairs, np.int32) for pairs in zip(*before, strict=True))
    after = np.stack(later, axis=1) if later else np.zeros((C, 0, 0, 2), np.int32)
    return Meetings(np.asarray(same, np.int32), first, after)  # type: ignore[arg-type]


def attend_chunks(
    kernel: Kernel,
    q: Float[Array, "B L N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    meetings: Meetings,
    *,
    sizes: tuple[int, int],
    scale: float,
    ring: str | None,
) -> Float[Array, "B L N H"]:
    """What the queries of this device read, in q's dtype. `sizes`: of a chunk of queries and of one of keys. With
    `ring`, an axis of a mesh, each round ends with keys and values going to the next device along it, and in the
    backward pass their gradients with them. What that pass needs is named ATTENTION_OUTPUT."""
    return _attend(_Chunks(kernel, scale, *sizes, ring), _Inputs(q, k, v, meetings))


def _through(chunks: _Chunks, one: Callable[..., Any], state: Any, travels: Any, meetings: Meetings) -> tuple[Any, Any]:
    """`one(state, travels, pair, causal)` for every pair of chunks that meet."""

    def over(state: Any, travels: Any, pairs: Array, causal: bool) -> tuple[Any, Any]:
        if not len(pairs):
            return state, travels
        step = lambda carry, pair: (one(*carry, pair, causal), None)  # noqa: E731
        return jax.lax.scan(step, (state, travels), pairs)[0]

    state, travels = over(state, travels, meetings.same, causal=True)
    state, travels = over(state, travels, meetings.whole, causal=False)
    if chunks.ring is None:
        return state, travels

    def turn(carry: tuple[Any, Any], pairs: Array) -> tuple[tuple[Any, Any], None]:
        state, travels = over(*carry, pairs, causal=False)
        return (state, onwards(travels, chunks.ring)), None

    return jax.lax.scan(turn, (state, onwards(travels, chunks.ring)), meetings.later)[0]


def _forward(chunks: _Chunks, x: _Inputs) -> tuple[Float[Array, "B L N H"], Float[Array, "B N L"]]:
    """The result, and the log of every query's normalizer."""

    def one(state: tuple[Array, Array], travels: tuple[Array, Array], pair: Array, causal: bool) -> tuple[Any, Any]:
        i, j = pair
        k_j, v_j = (cut(t, 1, j, chunks.size_s) for t in travels)
        read, of_read = chunks.kernel.forward(
            cut(x.q, 1, i, chunks.size_l), k_j, v_j, scale=chunks.scale, causal=causal
        )
        out, normalizer = cut(state[0], 1, i, chunks.size_l), cut(state[1], 2, i, chunks.size_l)
        both = jnp.logaddexp(normalizer, of_read)
        old, new = (jnp.moveaxis(jnp.exp(part - both), 1, 2)[..., None] for part in (normalizer, of_read))
        out = old * out + new * read.astype(out.dtype)
        return (paste(state[0], out, 1, i, chunks.size_l), paste(state[1], both, 2, i, chunks.size_l)), travels

    B, L, N, _ = x.q.shape
    nothing = jnp.zeros(x.q.shape), jnp.full((B, N, L), -jnp.inf)
    (out, normalizer), _ = _through(chunks, one, nothing, (x.k, x.v), x.meetings)
    return out.astype(x.q.dtype), normalizer


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(chunks: _Chunks, x: _Inputs) -> Float[Array, "B L N H"]:
    return _forward(chunks, x)[0]


def _attend_forward(chunks: _Chunks, x: _Inputs) -> tuple[Array, tuple[_Inputs, Array, Array]]:
    out, normalizer = (checkpoint_name(kept, ATTENTION_OUTPUT) for kept in _forward(chunks, x))
    return out, (x, out, normalizer)


def _attend_backward(chunks: _Chunks, kept: tuple[_Inputs, Array, Array], d_out: Array) -> tuple[_Inputs]:
    x, out, normalizer = kept

    def one(d_q: Array, travels: tuple[Array, ...], pair: Array, causal: bool) -> tuple[Array, tuple[Array, ...]]:
        (i, j), (k, v, d_k, d_v) = pair, travels
        q_i, out_i, d_i = (cut(t, 1, i, chunks.size_l) for t in (x.q, out, d_out))
        k_j, v_j = (cut(t, 1, j, chunks.size_s) for t in (k, v))
        of_q, of_k, of_v = chunks.kernel.backward(
            q_i, k_j, v_j, out_i, cut(normalizer, 2, i, chunks.size_l), d_i, scale=chunks.scale, causal=causal
        )
        d_k, d_v = (add(sum_, part, 1, j, chunks.size_s) for sum_, part in ((d_k, of_k), (d_v, of_v)))
        return add(d_q, of_q, 1, i, chunks.size_l), (k, v, d_k, d_v)

    d_q, d_k, d_v = (jnp.zeros(t.shape) for t in (x.q, x.k, x.v))
    d_q, (_, _, d_k, d_v) = _through(chunks, one, d_q, (x.k, x.v, d_k, d_v), x.meetings)
    grads = (grad.astype(t.dtype) for grad, t in ((d_q, x.q), (d_k, x.k), (d_v, x.v)))
    return (_Inputs(*grads, Meetings(None, None, None)),)  # type: ignore[arg-type]  # numbers of chunks have none


_attend.defvjp(_attend_forward, _attend_backward)
