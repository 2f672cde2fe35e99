"""How a framework runs a training step: what two programs of one model and layout do differently.

Each field is a thing that a framework's source says, not a fitted number; `experiments.validation.frameworks` reads
them from what a published row says of its software.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

from transformer.config import Backend
from transformer.losses import CHUNK_TOKENS
from transformer.sharding import Layout

Fusion = Literal["eager", "fused", "compiled", "scanned"]
Kernel = Literal["unfused", "flash1", "flash2", "best"]

KERNEL_SPEED = {"flash1": (0.54, 0.30), "flash2": (1.0, 0.58), "best": (1.0, 1.0)}
"""Forward and backward of an attention kernel over the best there is, before Hopper and from Hopper on. A100: 100 and
185 TFLOP/s (Dao 2023, fig. 5); H100: 35 % of peak where FlashAttention 3 has 60 to 75 % (Shah et al. 2024), and version
1 as much slower than 2 as on the A100. Both were written for Ampere's instructions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Practice:
    """The defaults are those of a framework of 2024 on GPUs: flash attention, fused kernels, what can overlap does."""

    name: str = "generic"
    fusion: Fusion = "fused"
    """Element-wise work. eager: a kernel an operator; fused: hand-written kernels where they pay (bias and GELU, bias,
    dropout and residual, softmax); compiled: whatever XLA or torch.compile can join; scanned: what
    XLA joins of our layers, which a loop goes through."""
    attention: Kernel = "best"
    """Attention in one kernel, scores never in device memory: flash1 and flash2 are FlashAttention's first two
    versions, best is what the device's vendor or FlashAttention 3 reach; unfused: two batched products and passes
    over the scores between them."""
    padded_values: bool = False
    """The attention kernel takes values of the keys' size alone: smaller ones are padded."""
    attention_in_chunks: bool = False
    """Over a split sequence the kernel is called for a chunk of queries and one of keys at a time, and what the calls
    return is joined in float32 (`transformer.chunkwise`)."""
    dropout: bool = False
    """Masks of hidden dropout (and of attention's, without flash) are made, read and kept."""
    separate_maps: bool = False
    """Queries, keys, values, gate and up are products of their own, a bias is added in a pass of its own."""
    batched_copies: bool = False
    """What is gathered or scattered along a sequence is put in order, if there are several sequences."""
    copies: int = 0
    """Passes over queries, keys, values and context that only change their order in memory."""
    host_s_per_kernel: float = 0.0
    """Seconds that the host takes to launch one kernel: 0 where graphs or XLA do it beforehand."""
    data_overlap: bool = True
    """Gradients of replicas (and the optimizer's shards) travel beside the backward pass of the last microbatch."""
    late_sums: bool = False
    """Of weights that fsdp splits too, the sum over replicas begins when the layer's is scattered, and nothing is left
    to hide it; of those that it does not split, embedding's and head's go in the open."""
    layers_in_loop: bool = False
    """The program has its layers in a loop, after which the sum over replicas begins (XLA's scan)."""
    weights_overlap: bool = True
    """New weights that ZeRO 1 and 2 gather once a step travel beside the forward pass."""
    gather_overlap: bool = True
    """Weights that fsdp splits are fetched beside the layer before."""
    fetch: Literal["ahead", "in_layer"] = "ahead"
    """When weights that fsdp splits are asked for: a layer ahead, or within the layer, each matrix beside the product
    with the one before (XLA, which moves no all-gather to the iteration before)."""
    stages_overlap: bool = True
    """In a pipeline too fsdp's collectives and sums over replicas travel beside compute."""
    tensor_overlap: float = 0.0
    """Part of tensor parallelism's communication that hides beside the product it feeds (async TP, user buffers)."""
    tensor_backward_overlap: bool = True
    """A split product's input gradient is reduced beside its weight's gradient (Korthikanti et al. 2022)."""
    pipeline_overlap: bool = True
    """Stages' messages travel beside compute (interleaved schedules on GPUs of their own streams)."""
    scatter_gather: bool = True
    """Messages between stages are split over tensor and gathered inside the node (Narayanan et al. 2021, sec. 4.1)."""
    expert_overlap: bool = False
    """The experts' all-to-all hides beside another microbatch's compute (DualPipe)."""
    schedule: Literal["1f1b", "gpipe", "lockstep"] = "1f1b"
    """Of stages. lockstep: in every tick each works on one microbatch forward and one backward; the vocabulary is split
    over stages (`transformer.pipeline`)."""
    gradient_bytes: int = 4
    """Of a gradient that accumulates over microbatches."""
    fresh_gradient_bytes: int = 0
    """Of a microbatch's gradient, where it stands in memory before it is added."""
    kept_passes: tuple[int, int] = (0, 0)
    """How often what is kept for the backward pass is read or written on its way there and back, without and with a
    pipeline."""
    kept_share: float = 1.0
    """Of what is counted to be kept under no remat, that is."""
    reduce_bytes: int = 4
    """Of a gradient as it travels."""
    fused_accumulation: bool = True
    """The weight's gradient is added up in the product's epilogue."""
    resident_weight_bytes: int = 2
    """Of the copy of the weights that compute reads; 4: fsdp keeps float32 and casts what it gathers."""
    repeats_last: bool = True
    """Full recomputation makes the last product of a layer again too, whose result no gradient needs."""
    joined_update: bool = False
    """The optimizer reads gradients for their norm, then all in one pass; float32 weights are read once more where they
    are cast. Else three passes in float32 beside that."""
    optimizer_bytes: int = 12
    """Of the optimizer's state with its master weights: Adam in float32, 12; all in bfloat16, 4."""
    gather_every_microbatch: bool = True
    """fsdp fetches weights and reduces gradients for each microbatch; else once a step."""
    reshard_after_forward: bool = True
    """fsdp forgets fetched weights after forward, and fetches them again."""
    reduce_every_microbatch: bool = False
    """Replicas too sum for each microbatch the gradients that ZeRO 2 and 3 scatter; under ZeRO 1 parts of a sequence do
    so."""
    chunk_tokens: int | None = None
    """Tokens whose logits stand in memory at once; None: all of a microbatch."""
    float32_logits: bool = True
    """The loss is taken of logits in float32 that stand in memory."""
    step_host_s: float = 0.0
    """Seconds of a step in which the host alone works: data, logging, the check of the gradients' norm."""

    @property
    def flash(self) -> bool:
        """Whether scores stay inside the kernel."""
        return self.attention != "unfused"

    @property
    def sum_bytes(self) -> int:
        """Moved to add up a gradient: the old sum is read and written and, outside the product, the new part read."""
        return 2 * self.gradient_bytes + (-2 if self.fused_accumulation else 2)

    def kernel_speed(self, *, is_hopper: bool) -> float:
        """Of the fused attention kernel, over the device's best."""
        return KERNEL_SPEED[self.attention][is_hopper]


GENERIC = Practice()


def ours(backend: Backend, layout: Layout) -> Practice:
    """How this project's train step runs, as XLA schedules it: `experiments.gradients`, `transformer.pipeline`,
    `transformer.losses`. Stored are float32 parameters and moments, split; beside them a copy in bfloat16 computes.

    `kept_passes` and `kept_share` are counted in compiled schedules (docs/plan.md); all else is what the code says."""
    return _ours(backend, layout.zero, layout.context > 1)


@cache
def _ours(backend: Backend, zero: int, is_split: bool) -> Practice:
    return Practice(
        name="ladder", fusion="scanned", separate_maps=True, batched_copies=True,
        attention="best" if backend in ("cudnn", "splash") else "unfused", padded_values=backend == "cudnn",
        data_overlap=zero > 1, late_sums=True, weights_overlap=False, fetch="in_layer", stages_overlap=False,
        tensor_backward_overlap=False, schedule="lockstep", pipeline_overlap=False, reduce_bytes=4 if zero == 1 else 2,
        reduce_every_microbatch=True, fused_accumulation=False, fresh_gradient_bytes=2, chunk_tokens=CHUNK_TOKENS,
        kept_passes=(5, 10), kept_share=2.5, repeats_last=False, joined_update=True,
        attention_in_chunks=backend == "cudnn" and is_split,
    )  # fmt: skip
