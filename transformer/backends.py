"""How attention is computed: four backends of one function, and the choice among them.

    xla        `attend` as it stands: holds all scores, does everything
    blockwise  the same by blocks (`blockwise.py`): memory linear in length, does everything, on any device
    cudnn      NVIDIA's fused kernel: 16 bit; dot products, biases, any mask; no soft cap, no sinks
    splash     the Pallas kernel for TPUs: dot products, soft cap, sinks, packed texts; no biases, no prefixes

All but the first do so over a split sequence too (`context.py`): cuDNN without a mask or under a causal one, splash
without one or under a causal one with a window or chunks too, with keys gathered.

JAX's two Pallas kernels for GPUs (`pallas.ops.gpu`) are left out: neither has a soft cap, sinks, a window or a bias;
the Triton one has no grouped heads, the Mosaic one no causal backward pass. cuDNN has all that they have.

Letters: B batch, L query length, S key length, K kv heads, G queries per kv head, N = K G, H head size, V that of
values.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from transformer.attention import Score, attend, dot
from transformer.blockwise import blockwise
from transformer.config import Backend, Precision
from transformer.context import over_context
from transformer.errors import RequestError, nearest
from transformer.kernels import cudnn, refuse, splash
from transformer.masks import Mask
from transformer.placement import UNSHARDED, Shard
from transformer.positions import Bias
from transformer.remat import ATTENTION_OUTPUT

SHORT = 2_048
"""Longest sequence whose whole score matrix is kept rather than computed by blocks."""

DENSE = 8_192
"""Longest sequence for which "auto" lets cuDNN hold a mask of all places: 128 MiB a sequence."""


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
    window: bool = False
    pattern: bool = False  # one that cuDNN does not know: chunks, or a window on both sides
    both_sides: bool = False  # a window or chunks without a causal mask
    split: bool = False  # sequences lie on several devices: the context axis
    ring: bool = False  # around which keys and values pass then
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
            "computes in 16 bit": precision == "f32",
            "has no additive scores": needs.score == "additive",
            "has no soft cap": needs.cap,
            "has no sinks": needs.sinks,
            f"has heads of at most {cudnn_head(chip)} there": max(needs.d_head, needs.d_value) > cudnn_head(chip),
            "adds no bias over a split sequence": needs.split and needs.bias,
            "has no mask but a causal one over a split sequence": needs.split
            and (needs.window or needs.pattern or needs.prefix or needs.segments),
        }
    elif backend == "splash":
        lacks = {
            "needs a TPU": chip.platform != "tpu",
            "has no additive scores": needs.score == "additive",
            "adds no bias to scores": needs.bias,
            "has no prefix mask": needs.prefix,
            "has no packed texts over a split sequence": needs.split and needs.segments,
            "has no window or chunks on both sides over a split sequence": needs.split and needs.both_sides,
            "passes no keys around a ring": needs.split and needs.ring,
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
            return plain, f"{plain}: {kernel or 'a kernel'} {lacks}"
        than = f"{length:,} tokens are {'no more' if length <= SHORT else 'more'} than {SHORT:,}"
        return plain, f"{plain}: {kernel or 'a kernel'} {lacks}; {than}"
    backend: Backend = asked  # type: ignore[assignment]
    reason = supports(backend, needs, chip=chip, precision=precision)
    if reason:
        if lacks and supports(plain, needs, chip=chip, precision=precision):
            raise RequestError(f"--attention={asked} {reason}; nearest: context=1")
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
    if backend == "blockwise" and shard.context_shards > 1:
        return over_context(q, k, v, mask, **pieces, shard=shard)
    if backend == "xla":
        refuse("xla", {"way to split a sequence": shard.context_shards > 1})
        return checkpoint_name(attend(q, k, v, mask, **pieces), ATTENTION_OUTPUT)
    if backend == "blockwise":
        return blockwise(q, k, v, mask, **pieces)
    return (cudnn if backend == "cudnn" else splash)(q, k, v, mask, **pieces, shard=shard)
