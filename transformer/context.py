"""Attention over a sequence that is split over devices: the `context` axis.

Each device has some of the queries, and some of the keys and values. Either all keys and values are gathered before
(Llama 3, 2024, sec. 3.3.2), or they pass around a ring of devices, each time meeting other queries while the next are
on their way (Liu et al. 2023). What is computed is `blockwise.py`'s, with every block told where it stands, or where a
mask has no more to say than causality, `chunkwise.py`'s by a fused kernel.

Under a causal mask the last queries see most. So the sequence is cut into twice as many chunks as there are devices,
and device i has chunk i and the i-th from the end: all devices then meet as many keys (Brandon et al. 2023).

Letters: B batch, L query length, S key length, K kv heads, G queries per kv head, H head size, V that of values; R
rounds, C devices.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from transformer.attention import Score
from transformer.blockwise import BLOCK, Places, attend_blocks, mean_where, visible_from
from transformer.chunkwise import Kernel, attend_chunks, meetings_of
from transformer.masks import Mask
from transformer.placement import Shard
from transformer.positions import Bias
from transformer.sharding import context_order, keys_by_round

AXIS = "context"


def over_context(
    q: Float[Array, "B L K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    *,
    scale: float,
    score: Score,
    bias: Bias | None,
    cap: float | None,
    sinks: Float[Array, "K G"] | None,
    shard: Shard,
    block: int = BLOCK,
) -> Float[Array, "B L K G V"]:
    """`attend` where positions are in the order of `context_order` and each device has its part of them."""
    C, L, S = shard.context_shards, q.shape[1], k.shape[1]
    sizes = _block_size(L, C, block), _block_size(S, C, block)
    tables = places_of(mask, L, S, C, sizes=sizes, ring=shard.ring)
    arrays, make_mask = jax.tree.flatten(mask)
    # Masks are asked for places, so what they hold of every position is put in the order of places again.
    arrays = [in_order(a, C) if a.ndim == 2 else a for a in arrays]
    of_bias, make_bias = jax.tree.flatten(bias)
    learned, make_score = jax.tree.flatten(score if isinstance(score, Partial) else Partial(score))

    def here(q: Array, k: Array, v: Array, arrays: Any, of_bias: Any, sinks: Any, learned: Any) -> Array:
        mean = jax.lax.pmean(v.astype(jnp.float32).mean(1, keepdims=True), AXIS)  # what a query without keys returns
        mine = jax.tree.map(lambda t: jnp.asarray(t)[jax.lax.axis_index(AXIS)], tables)
        k, v = there(k, v, shard)
        whole = jax.tree.unflatten(make_bias, of_bias)
        score: Score = jax.tree.unflatten(make_score, learned)
        score, weights = jax.closure_convert(score, q[:, : sizes[0]], k[:, : sizes[1]])
        out, blind = attend_blocks(
            q, k, v, jax.tree.unflatten(make_mask, arrays), mine, sizes=sizes, scale=scale, score=score,
            weights=weights, bias=None if whole is None else _OwnHeads(whole, q.shape[2]), cap=cap, sinks=sinks,
            ring=AXIS if shard.ring else None,
        )  # fmt: skip
        return mean_where(jnp.moveaxis(blind, 3, 1), out, mean.astype(v.dtype))

    of_heads = ("kv_heads", "group", "head")
    queries, keys = ("batch", "length", *of_heads), ("batch", "length", "kv_heads", "head")
    dims = (
        queries, keys, keys,
        [("batch", "channel")[: a.ndim] for a in arrays],
        [("channel",) * a.ndim for a in of_bias],
        None if sinks is None else of_heads[:2],
        [of_heads for _ in learned],
    )  # fmt: skip
    return shard.local(here, dims, queries)(q, k, v, arrays, of_bias, sinks, learned)


def over_context_by(
    kernel: Kernel,
    q: Float[Array, "B L K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool,
    scale: float,
    shard: Shard,
) -> Float[Array, "B L K G H"]:
    """The same by a fused kernel, without a mask or under a causal one of L = S positions."""
    assert not causal or q.shape[1] == k.shape[1], (q.shape, k.shape)
    C = shard.context_shards
    tables = meetings_of(C, causal=causal, ring=shard.ring)

    def here(q: Array, k: Array, v: Array) -> Array:
        mine = jax.tree.map(lambda t: jnp.asarray(t)[jax.lax.axis_index(AXIS)], tables)
        B, L, K, G, H = q.shape
        size_s = k.shape[1] // 2 if causal else k.shape[1] * (1 if shard.ring else C)
        k, v = there(k, v, shard)
        out = attend_chunks(
            kernel, q.reshape(B, L, K * G, H), k, v, mine, sizes=(L // 2 if causal else L, size_s), scale=scale,
            ring=AXIS if shard.ring else None,
        )  # fmt: skip
        return out.reshape(B, L, K, G, H)

    queries = ("batch", "length", "kv_heads", "group", "head")
    keys = (*queries[:3], "head")
    return shard.local(here, (queries, keys, keys), queries)(q, k, v)


def there(k: Array, v: Array, shard: Shard) -> tuple[Array, Array]:
    """The keys and values of all devices, or around a ring one's own, the first to be met."""
    if shard.ring:
        return k, v
    gather = partial(jax.lax.all_gather, axis_name=AXIS, axis=1, tiled=True)
    return gather(k), gather(v)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _OwnHeads(Bias):
    """Of a bias of all heads those that this device has."""

    of_all: Bias
    n: int = field(metadata={"static": True})

    def __call__(self, queries: Int[Array, " L"], keys: Int[Array, " S"]) -> Float[Array, "K G L S"]:
        return jax.lax.dynamic_slice_in_dim(self.of_all(queries, keys), jax.lax.axis_index("tensor") * self.n, self.n)


def places_of(mask: Mask, L: int, S: int, C: int, *, sizes: tuple[int, int], ring: bool) -> Places:
    """Every device's places and the blocks that meet in every round, devices in front."""
    queries, keys = context_order(L, C).reshape(C, -1), context_order(S, C).reshape(C, -1)
    found: list[list[Any]] = []
    for device in range(C):
        rounds = keys_by_round(keys, device, ring=ring)
        first = queries[device, :: sizes[0]]
        found.append([(at, visible_from(mask, first, sizes[0], at[:: sizes[1]], sizes[1])) for at in rounds])
    most = max(len(pairs) for rounds in found for _, pairs in rounds)

    def filled(pairs: Int[np.ndarray, "pairs 2"]) -> Int[np.ndarray, "{most} 2"]:
        return np.pad(pairs, ((0, most - len(pairs)), (0, 0)), constant_values=-1)

    return Places(
        queries,  # type: ignore[arg-type]  # numbers, not yet arrays
        np.array([[at for at, _ in rounds] for rounds in found]),  # type: ignore[arg-type]
        np.array([[filled(pairs) for _, pairs in rounds] for rounds in found]),  # type: ignore[arg-type]
    )


def _block_size(length: int, C: int, most: int) -> int:
    """The largest block that divides a chunk."""
    chunk = length // (2 * C)
    return max(n for n in range(1, min(most, chunk) + 1) if chunk % n == 0)


def in_order(array: Array, C: int) -> Array:
    """[B, L, ...] of the order of devices, in the order of places."""
    return jnp.take(array, np.argsort(context_order(array.shape[1], C)), axis=1)
