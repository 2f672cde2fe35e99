"""Attention by the fused kernels that others wrote: cuDNN's for NVIDIA GPUs, JAX's "splash" for TPUs. Each is told a
mask in its own terms, and refuses in one line what it has no terms for.

Letters: B batch, L query length, S key length, K kv heads, G queries per kv head, N = K G, H head size, V that of
values.
"""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from transformer import cudnn_calls
from transformer.attention import Score, dot
from transformer.blockwise import BLOCK, cut, mean_where, padded, visible_from
from transformer.chunkwise import Kernel
from transformer.config import Backend
from transformer.context import AXIS, in_order, over_context_by, there
from transformer.errors import RequestError
from transformer.masks import Both, Causal, Chunked, Everything, Mask, Segments, Window, parts
from transformer.placement import UNSHARDED, Shard
from transformer.positions import Bias
from transformer.remat import ATTENTION_OUTPUT
from transformer.sharding import context_order

LANES = 128
"""What a TPU's vectors hold: splash wants lengths to be multiples of it."""

SPLASH_SIZES = (BLOCK, 384, 256, LANES)
"""Queries and keys of a block of splash: the largest of these that divides the length."""


def cudnn(
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
    shard: Shard = UNSHARDED,
) -> Float[Array, "B L K G V"]:
    """`attend` by cuDNN's kernel (Dao et al. 2022). It knows `Causal`, and `Window` under it, and skips what they
    hide. Other masks and a bias it is given as an array of all places in q's dtype, and then it has no window either.

    It has one head size here, a multiple of 8: smaller heads are padded with zeros. JAX takes values of another size
    in a private function only; padding adds 17 % to the products of DeepSeek's heads of 192 and 128.
    """
    refuse("cudnn", {"soft cap": cap is not None, "sinks": sinks is not None, "such scores": score is not dot})
    (B, L, K, G, H), (S, V) = q.shape, (v.shape[1], v.shape[3])
    size = -(-max(H, V) // 8) * 8
    causal = any(isinstance(part, Causal) for part in parts(mask))
    if shard.context_shards > 1:
        others = [type(part).__name__ for part in parts(mask) if not isinstance(part, Everything | Causal)]
        refuse("cudnn", {f"{name} over a split sequence": True for name in (*others, *["bias"] * (bias is not None))})
        kernel = Kernel(cudnn_calls.forward, cudnn_calls.backward)
        return over_context_by(
            kernel, *(_to_size(x, size) for x in (q, k, v)), causal=causal, scale=scale, shard=shard
        )[..., :V]
    own: tuple[type[Mask], ...] = (Everything,)
    if causal:
        own += (Causal,)
        if bias is None and L <= S and all(isinstance(part, (*own, Window)) for part in parts(mask)):
            own += (Window,)
    windows = [part.size for part in parts(mask) if isinstance(part, Window) and Window in own]
    others = [part for part in parts(mask) if not isinstance(part, own)]
    arrays: dict[str, Any] = {}
    if others:
        seen = reduce(Both, others)(jnp.arange(L), jnp.arange(S))
        arrays["mask"] = (shard.activation(seen, "batch", "channel", "channel") if len(seen) > 1 else seen)[:, None]
    if bias is not None:
        added = shard.activation(bias(jnp.arange(L), jnp.arange(S)), "kv_heads", "group", "channel", "channel")
        arrays["bias"] = added.astype(q.dtype).reshape(1, K * G, L, S)
    if arrays and (L % 2 or S % 2):  # with an array, lengths are even; what is added to them is not seen
        arrays["mask"] = arrays.get("mask", jnp.ones((1, 1, L, S), bool))
        arrays = {name: padded(padded(x, 2, 2), 3, 2) for name, x in arrays.items()}
        q, k, v = (padded(x, 1, 2) for x in (q, k, v))
    q, k, v = (_to_size(x, size) for x in (q, k, v))
    with cudnn_calls.refusals():
        out_BLNV = jax.nn.dot_product_attention(
            q.reshape(*q.shape[:2], K * G, -1), k, v, **arrays, scale=scale, implementation="cudnn",
            is_causal=causal, local_window_size=(min(windows) - 1, 0) if windows else None,
        )  # fmt: skip
    out = out_BLNV.reshape(B, -1, K, G, q.shape[-1])[:, :L, ..., :V]
    return mean_where(_blind(mask, L, S), out, v[:, :S, ..., :V]) if others else out


def splash(
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
    shard: Shard = UNSHARDED,
    interpret: bool = False,
) -> Float[Array, "B L K G V"]:
    """`attend` by JAX's "sparse flash" kernel for TPUs: blocks that the mask's pattern empties are skipped, those
    that `Segments` empties are not. Queries are scaled before, and so rounded once more where they are bfloat16.

    The compiler does not split it over a mesh, so every device runs it on its own part. `interpret`: without a TPU.
    """
    refuse("splash", {"bias": bias is not None, "such scores": score is not dot})
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (L, S), C = (q.shape[1], k.shape[1]), shard.context_shards
    segments = [part for part in parts(mask) if isinstance(part, Segments)]
    pattern = reduce(Mask.__and__, (part for part in parts(mask) if not isinstance(part, Segments)), Everything())
    causal = any(isinstance(part, Causal) for part in parts(pattern))
    both_sides = not causal and pattern != Everything()
    lacking = {"ring": shard.ring, "packed texts": bool(segments), "window or chunks on both sides": both_sides}
    refuse("splash", {f"{name} over a split sequence": C > 1 and asked for name, asked in lacking.items()})
    # A device's queries lie in chunks, each filled up for itself, so that no block has places of two.
    n_chunks = 2 if C > 1 else 1
    starts = context_order(C * n_chunks, C) * (L // (C * n_chunks))
    chunk, n_keys = (-(-n // LANES) * LANES for n in (L // (C * n_chunks), S))
    size_l, size_s = (max(n for n in SPLASH_SIZES if length % n == 0) for length in (chunk, n_keys))
    heads = ("batch", "length", "kv_heads", "group", "head")
    arguments, dims = [(q.astype(jnp.float32) * scale).astype(q.dtype), k, v], [heads, *[(*heads[:3], "head")] * 2]
    seen_to_the_end = n_keys > S and not (L <= S and causal)
    if segments or seen_to_the_end:
        arguments += _segment_ids(segments, q.shape[0], L, S)
        dims += [("batch", "length"), ("batch", "channel")]
    if sinks is not None:
        arguments, dims = [*arguments, sinks], [*dims, ("kv_heads", "group")]
    places = (starts[:, None] + np.arange(chunk)).reshape(-1)
    firsts = places.reshape(C, -1)[:, ::size_l]
    n_tables = C if causal else 1  # without a mask one for all; JAX makes several only if some block is seen in part
    one_head = _splash_mask(pattern, places[: len(places) * n_tables // C], n_keys)
    keys = np.arange(0, n_keys, size_s)
    seen = max(len(visible_from(pattern, first, size_l, keys, size_s)) for first in firsts)

    def in_chunks(x: Array) -> Array:
        """[B, L, ...], every chunk filled up."""
        return padded(x.reshape(x.shape[0], n_chunks, -1, *x.shape[2:]), 2, LANES).reshape(x.shape[0], -1, *x.shape[2:])

    def local(q: Array, k: Array, v: Array, *rest: Array) -> Array:
        B, n_queries, K, G, _ = q.shape
        kernel: Any = kernels.make_splash_mha(
            masks.MultiHeadMask([one_head] * (K * G)), head_shards=1, q_seq_shards=n_tables,
            block_sizes=kernels.BlockSizes(
                size_l, size_s, block_q_dkv=size_l, block_kv_dkv=size_s, block_q_dq=size_l, block_kv_dq=size_s
            ),
            attn_logits_soft_cap=cap, residual_checkpoint_name=ATTENTION_OUTPUT, interpret=interpret,
        )  # fmt: skip
        if C > 1:
            kernel, k, v = _own_tables(kernel, n_tables), *(in_order(t, C) for t in there(k, v, shard))
        q, k, v = in_chunks(q), padded(k, 1, LANES), padded(v, 1, LANES)
        ids = None
        if len(rest) > 1:
            ids = kernels.SegmentIds(in_chunks(rest[0]), padded(rest[1], 1, LANES, -1))
        # In q's dtype because JAX before 0.11 returns their gradient in it.
        own_sinks = rest[-1].reshape(-1).astype(q.dtype) if rest and sinks is not None else None
        q, k, v = (jnp.moveaxis(x, 1, 2) for x in (q.reshape(*q.shape[:2], K * G, -1), k, v))
        with jax.named_scope(SPLASH_BLOCKS.format(seen, firsts.shape[1] * len(keys))):
            out_BNLV = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, ids, own_sinks))(q, k, v, ids)
        out = jnp.moveaxis(out_BNLV, 2, 1).reshape(B, n_chunks, chunk, K, G, -1)
        return out[:, :, : n_queries // n_chunks].reshape(B, n_queries, K, G, -1)

    out = shard.local(local, dims, heads)(*arguments)
    return mean_where(_blind(mask, L, S), out, v) if segments and sinks is None else out


SPLASH_BLOCKS = "sees_{}_of_{}_blocks"
"""The scope that splash runs in: for who reads the compiled program, where the kernel says nothing of its work."""


def _segment_ids(
    segments: list[Segments], batch: int, n_queries: int, n_keys: int
) -> tuple[Int[Array, "B L"], Int[Array, "B S"]]:
    """Ids that are equal where a query may see a key, by all of the masks: padding, 0, has -1 among the keys."""
    queries, keys = jnp.ones((batch, n_queries), jnp.int32), jnp.ones((batch, n_keys), jnp.int32)
    for part in segments:
        n = jnp.maximum(part.queries.max(1), part.keys.max(1))[:, None] + 1  # by sequence: devices hold their own
        queries = jnp.where((queries > 0) & (part.queries > 0), queries * n + part.queries, 0)
        keys = jnp.where((keys > 0) & (part.keys > 0), keys * n + part.keys, 0)
    return queries, jnp.where(keys > 0, keys, -1)


def _splash_mask(pattern: Mask, places: Int[np.ndarray, " L"], n_keys: int) -> Any:
    """A pattern in splash's terms, of queries at such places. One that joins several the kernel reads from memory,
    others it computes from places: so chunks are joined with `CausalMask`, for their division asks a TPU what it can,
    which may be absent."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = len(places), n_keys

    def at_places(mask: Any) -> Any:
        mask.q_sequence = places.astype(np.int32)
        return mask

    causal = any(isinstance(part, Causal) for part in parts(pattern))
    found: list[Any] = []
    for part in parts(pattern):
        match part:
            case Window(size):
                found.append(at_places(masks.LocalMask(shape, (size - 1, 0 if causal else size - 1), 0)))
            case Chunked(size) if causal:
                found.append(at_places(masks.ChunkedCausalMask(shape, size)) & at_places(masks.CausalMask(shape)))
            case Chunked(size):
                found.append(masks.NumpyMask(places[:, None] // size == np.arange(n_keys)[None] // size))
            case Causal() | Everything():
                pass
            case _:
                refuse("splash", {f"mask {type(part).__name__}": True})
    if found:
        return reduce(lambda a, b: a & b, found)
    return at_places(masks.CausalMask(shape)) if causal else masks.FullMask(shape)


def _own_tables(kernel: Any, n: int) -> Any:
    """A splash kernel whose tables are of n parts of the queries, with those of this device's part alone."""
    here = jax.lax.axis_index(AXIS) if n > 1 else jnp.int32(0)

    def own(table: Any, axis: int) -> Any:
        return None if table is None else cut(table, axis, here, table.shape[axis] // n)

    def of(info: Any) -> Any:
        tables = {name: own(getattr(info, name), 1) for name in ("data_next", "mask_next", "block_mask")}
        return info._replace(**tables, q_sequence=own(info.q_sequence, 0))

    return type(kernel)(*map(of, (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)), **kernel.kwargs)


def _blind(mask: Mask, n_queries: int, n_keys: int) -> Bool[Array, "#B L 1 1"]:
    """Queries that see no key, asked block by block: TPUs would hold the mask of all places to ask for all at once."""
    queries = jnp.minimum(jnp.arange(-(-n_queries // BLOCK) * BLOCK), n_queries - 1).reshape(-1, BLOCK)
    seen_nBl = jax.lax.map(lambda places: mask(places, jnp.arange(n_keys)).any(-1), queries)
    return ~jnp.moveaxis(seen_nBl, 0, 1).reshape(seen_nBl.shape[1], -1)[:, :n_queries, None, None]


def _to_size(x: Float[Array, "*any H"], size: int) -> Float[Array, "*any {size}"]:
    """Heads with zeros at their end: scores stay as they are."""
    return padded(x, x.ndim - 1, size)


def refuse(backend: Backend, lacking: dict[str, bool]) -> None:
    for feature, asked in lacking.items():
        if asked:
            raise RequestError(f"--attention={backend} has no {feature}; nearest: --attention=blockwise")
