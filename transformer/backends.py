"""How attention is computed: four backends of one function, and the choice among them.

    xla        `attend` as it stands: holds all scores, does everything
    blockwise  the same by blocks (`blockwise.py`): memory linear in length, does everything, on any device
    cudnn      NVIDIA's fused kernel: 16 bit; dot products, biases, any mask; no soft cap, no sinks
    splash     the Pallas kernel for TPUs: dot products, soft cap, sinks, packed texts; no biases, no prefixes

JAX's two Pallas kernels for GPUs (`pallas.ops.gpu`) are left out: neither has a soft cap, sinks, a window or a bias;
the Triton one has no grouped heads, the Mosaic one no causal backward pass. cuDNN has all that they have.

Letters: B batch, L query length, S key length, K kv heads, G queries per kv head, N = K G, H head size, V that of
values.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from transformer.attention import Score, attend, dot
from transformer.blockwise import BLOCK, blockwise, mean_where, padded, visible_blocks
from transformer.config import Backend, Precision
from transformer.context import over_context
from transformer.errors import RequestError, nearest
from transformer.masks import Both, Causal, Chunked, Everything, Mask, Segments, Window, parts
from transformer.placement import UNSHARDED, Shard
from transformer.positions import Bias
from transformer.remat import ATTENTION_OUTPUT

SHORT = 2_048
"""Longest sequence whose whole score matrix is kept rather than computed by blocks."""

DENSE = 8_192
"""Longest sequence for which "auto" lets cuDNN hold a mask of all places: 128 MiB a sequence."""

LANES = 128
"""What a TPU's vectors hold: splash wants lengths to be multiples of it."""

SPLASH_SIZES = (BLOCK, 384, 256, LANES)
"""Queries and keys of a block of splash: the largest of these that divides the length."""


class Chip(NamedTuple):
    """What a backend is told of the device that it would run on."""

    platform: str  # "cpu", "gpu" or "tpu"
    generation: tuple[int, ...] | None = None  # of an NVIDIA GPU: its compute capability; None is taken for the newest


def cudnn_head(chip: Chip) -> int:
    """cuDNN's largest head: 256 from Hopper on, 128 before. It is also a multiple of 8."""
    return 128 if chip.generation and chip.generation < (9, 0) else 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a model's attentions ask of a backend."""

    score: str = "scaled_dot"  # as in ModelConfig; cosine is the dot product of normed vectors
    bias: bool = False
    cap: bool = False
    sinks: bool = False
    prefix: bool = False
    segments: bool = False  # packed texts or padding
    pattern: bool = False  # one that cuDNN does not know: chunks, or a window on both sides
    split: bool = False  # sequences lie on several devices: the context axis
    d_head: int
    d_value: int


def supports(backend: Backend, needs: Needs, *, chip: Chip, precision: Precision) -> str | None:
    """Why a backend cannot do what a model needs, in a few words; None if it can."""
    lacks: dict[str, bool] = {
        "does not split a sequence": backend == "xla" and needs.split,
        "does not split a sequence with additive scores": needs.score == "additive" and needs.split,
    }
    if backend == "cudnn":
        lacks = {
            "needs an NVIDIA GPU": chip.platform != "gpu",
            "does not split a sequence": needs.split,
            "computes in 16 bit": precision == "f32",
            "has no additive scores": needs.score == "additive",
            "has no soft cap": needs.cap,
            "has no sinks": needs.sinks,
            f"has heads of at most {cudnn_head(chip)} there": max(needs.d_head, needs.d_value) > cudnn_head(chip),
        }
    elif backend == "splash":
        lacks = {
            "needs a TPU": chip.platform != "tpu",
            "does not split a sequence": needs.split,
            "has no additive scores": needs.score == "additive",
            "adds no bias to scores": needs.bias,
            "has no prefix mask": needs.prefix,
        }
    return next((reason for reason, lacking in lacks.items() if lacking), None)


def choose(asked: str, needs: Needs, *, chip: Chip, precision: Precision, length: int) -> tuple[Backend, str]:
    """The backend that runs, and why: the one asked for; for "auto" the platform's kernel where it can, else plain
    attention while its scores are few, else blocks. RequestError where the one asked for cannot."""
    if asked not in ("auto", *get_args(Backend)):
        raise RequestError(f"--attention={asked}: {nearest(asked, ('auto', *get_args(Backend)))}")
    small = length <= SHORT and needs.score != "additive" and not needs.split
    plain: Backend = "xla" if small else "blockwise"
    kernel: Backend | None = "splash" if chip.platform == "tpu" else "cudnn" if chip.platform == "gpu" else None
    lacks = supports(kernel, needs, chip=chip, precision=precision) if kernel else "needs a GPU or TPU"
    if asked == "auto":
        lacks = lacks or (_heavy(needs, length) if kernel == "cudnn" else None)
        if kernel and not lacks:
            return kernel, f"{kernel}: the {chip.platform}'s kernel has what the model needs"
        if needs.split:
            reason = supports(plain, needs, chip=chip, precision=precision)
            if reason:
                raise RequestError(f"--attention={plain} {reason}; nearest: context=1")
            return plain, f"{plain}: it splits sequences over the context axis"
        than = f"{length:,} tokens are {'no more' if length <= SHORT else 'more'} than {SHORT:,}"
        return plain, f"{plain}: {kernel or 'a kernel'} {lacks}; {than}"
    backend: Backend = asked  # type: ignore[assignment]
    reason = supports(backend, needs, chip=chip, precision=precision)
    if reason:
        near = plain if lacks else kernel
        raise RequestError(f"--attention={asked} {reason}; nearest: --attention={near}")
    return backend, f"{backend}: asked for"


def _heavy(needs: Needs, length: int) -> str | None:
    """Why cuDNN, though it could, is not chosen: what it is told of single pairs it is told in an array of all."""
    if needs.bias and needs.segments:
        return "would hold a bias of every sequence and head"
    if needs.bias and length > SHORT:
        return "would hold a bias of every head"
    if (needs.prefix or needs.segments or needs.pattern) and length > DENSE:
        return "would hold a mask of all places"
    return None


def attend_by(
    backend: Backend,
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
    """`attend` by a backend. RequestError where it cannot. What the backward pass needs from the forward pass is
    named ATTENTION_OUTPUT; only cuDNN's is not, but known by its primitive."""
    pieces: dict[str, Any] = {"scale": scale, "score": score, "bias": bias, "cap": cap, "sinks": sinks}
    if shard.context_shards > 1:
        if backend != "blockwise":
            raise RequestError(f"--attention={backend} does not split a sequence; nearest: --attention=blockwise")
        return over_context(q, k, v, mask, **pieces, shard=shard)
    if backend == "xla":
        return checkpoint_name(attend(q, k, v, mask, **pieces), ATTENTION_OUTPUT)
    if backend == "blockwise":
        return blockwise(q, k, v, mask, **pieces)
    return (cudnn if backend == "cudnn" else splash)(q, k, v, mask, **pieces, shard=shard)


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
    _refuse("cudnn", {"soft cap": cap is not None, "sinks": sinks is not None, "such scores": score is not dot})
    (B, L, K, G, H), (S, V) = q.shape, (v.shape[1], v.shape[3])
    own: tuple[type[Mask], ...] = (Everything,)
    if any(isinstance(part, Causal) for part in parts(mask)):
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
    q, k, v = (_to_size(x, -(-max(H, V) // 8) * 8) for x in (q, k, v))
    try:
        out_BLNV = jax.nn.dot_product_attention(
            q.reshape(*q.shape[:2], K * G, -1), k, v, **arrays, scale=scale, implementation="cudnn",
            is_causal=Causal in own, local_window_size=(min(windows) - 1, 0) if windows else None,
        )  # fmt: skip
    except NotImplementedError as error:  # the installed cuDNN, or an older GPU
        raise RequestError(f"--attention=cudnn: {str(error).rstrip('.')}; nearest: --attention=blockwise") from error
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
    _refuse("splash", {"bias": bias is not None, "such scores": score is not dot})
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    L, S = q.shape[1], k.shape[1]
    segments = [part for part in parts(mask) if isinstance(part, Segments)]
    pattern = reduce(Mask.__and__, (part for part in parts(mask) if not isinstance(part, Segments)), Everything())
    q, k_, v_ = (padded(x, 1, LANES) for x in ((q.astype(jnp.float32) * scale).astype(q.dtype), k, v))
    lengths = q.shape[1], k_.shape[1]
    size_l, size_s = (max(n for n in SPLASH_SIZES if length % n == 0) for length in lengths)
    heads = ("batch", "length", "kv_heads", "group", "head")
    arguments, dims = [q, k_, v_], [heads, (*heads[:3], "head"), (*heads[:3], "head")]
    seen_to_the_end = lengths[1] > S and not (L <= S and any(isinstance(part, Causal) for part in parts(pattern)))
    if segments or seen_to_the_end:
        ids = _segment_ids(segments, q.shape[0], L, S)
        arguments += [padded(ids[0], 1, LANES), padded(ids[1], 1, LANES, -1)]
        dims += [("batch", "length")] * 2
    if sinks is not None:
        arguments, dims = [*arguments, sinks], [*dims, ("kv_heads", "group")]
    one_head = _splash_mask(pattern, lengths)
    grid = lengths[0] // size_l, lengths[1] // size_s
    seen = len(visible_blocks(pattern, grid[0], size_l, grid[1], size_s))

    def local(q: Array, k: Array, v: Array, *rest: Array) -> Array:
        B, _, K, G, _ = q.shape
        kernel: Any = kernels.make_splash_mha(
            masks.MultiHeadMask([one_head] * (K * G)), head_shards=1, q_seq_shards=1,
            block_sizes=kernels.BlockSizes(
                size_l, size_s, block_q_dkv=size_l, block_kv_dkv=size_s, block_q_dq=size_l, block_kv_dq=size_s
            ),
            attn_logits_soft_cap=cap, residual_checkpoint_name=ATTENTION_OUTPUT, interpret=interpret,
        )  # fmt: skip
        ids = kernels.SegmentIds(*rest[:2]) if len(rest) > 1 else None
        # In q's dtype because JAX before 0.11 returns their gradient in it.
        own_sinks = rest[-1].reshape(-1).astype(q.dtype) if rest and sinks is not None else None
        q, k, v = jnp.moveaxis(q.reshape(B, lengths[0], K * G, -1), 1, 2), jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
        with jax.named_scope(SPLASH_BLOCKS.format(seen, grid[0] * grid[1])):
            out_BNLV = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, ids, own_sinks))(q, k, v, ids)
        return jnp.moveaxis(out_BNLV, 2, 1).reshape(B, lengths[0], K, G, -1)

    out = shard.local(local, dims, heads)(*arguments)[:, :L]
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


def _splash_mask(pattern: Mask, shape: tuple[int, int]) -> Any:
    """A pattern in splash's terms. One that joins several the kernel reads from memory, others it computes from places:
    so chunks are joined with `CausalMask`, for their division asks a TPU what it can, which may be absent."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    causal = any(isinstance(part, Causal) for part in parts(pattern))
    found: list[Any] = []
    for part in parts(pattern):
        match part:
            case Window(size):
                found.append(masks.LocalMask(shape, (size - 1, 0 if causal else size - 1), 0))
            case Chunked(size) if causal:
                found.append(masks.ChunkedCausalMask(shape, size) & masks.CausalMask(shape))
            case Chunked(size):
                queries, keys = (np.arange(length) // size for length in shape)
                found.append(masks.NumpyMask(queries[:, None] == keys[None]))
            case Causal() | Everything():
                pass
            case _:
                _refuse("splash", {f"mask {type(part).__name__}": True})
    if found:
        return reduce(lambda a, b: a & b, found)
    return masks.CausalMask(shape) if causal else masks.FullMask(shape)


def _blind(mask: Mask, n_queries: int, n_keys: int) -> Bool[Array, "#B L 1 1"]:
    """Queries that see no key, asked block by block: TPUs would hold the mask of all places to ask for all at once."""
    queries = jnp.minimum(jnp.arange(-(-n_queries // BLOCK) * BLOCK), n_queries - 1).reshape(-1, BLOCK)
    seen_nBl = jax.lax.map(lambda places: mask(places, jnp.arange(n_keys)).any(-1), queries)
    return ~jnp.moveaxis(seen_nBl, 0, 1).reshape(seen_nBl.shape[1], -1)[:, :n_queries, None, None]


def _to_size(x: Float[Array, "*any H"], size: int) -> Float[Array, "*any {size}"]:
    """Heads with zeros at their end: scores stay as they are."""
    return padded(x, x.ndim - 1, size)


def _refuse(backend: Backend, lacking: dict[str, bool]) -> None:
    for feature, asked in lacking.items():
        if asked:
            raise RequestError(f"--attention={backend} has no {feature}; nearest: --attention=blockwise")
