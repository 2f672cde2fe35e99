"""What the closed form is asked: a model, a layout, a batch, and how it is run."""

from dataclasses import dataclass
from typing import Literal

from experiments.forecast.closed_form.practice import GENERIC, Practice
from transformer.config import ModelConfig
from transformer.sharding import Layout

Remat = Literal["none", "selective", "ops", "dots", "full"]
"""What is forgotten and made again: nothing; attention (Korthikanti et al. 2022); all but attention and every other
product (PyTorch's selective checkpointing by operator); element-wise work alone (ours); whole layers."""

LINEAR_DTYPE = {"bf16": "bf16", "fp16": "f16", "fp8": "f8e4m3fn", "f32": "f32", "int8": "s8"}
"""Element type of the linear maps' products. Attention and the head stay in the wider type under fp8 and int8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One training step. `layout.zero` is of the fsdp axis: 1 is Megatron's distributed optimizer."""

    model: ModelConfig
    layout: Layout
    seq_len: int
    micro_batch_seqs: int  # of one data shard
    microbatches: int = 1
    precision: Literal["bf16", "fp16", "fp8", "f32", "int8"] = "bf16"
    remat: Remat = "none"
    remat_share: float = 1.0  # of the layers; the others keep everything
    sequence_parallel: bool = True  # activations between layers are split over tensor too
    slow_scaling: bool = False  # fp8 with a scale per row: every operand is read and cast once per product
    layers_only: bool = False  # forward and backward of the layers, without head, reduction and optimizer
    adapters_only: bool = False  # weights are frozen (LoRA): no gradients of theirs, nothing to reduce or update
    practice: Practice = GENERIC

    @property
    def global_batch_seqs(self) -> int:
        return self.micro_batch_seqs * self.microbatches * self.layout.data_shards

    @property
    def linear_dtype(self) -> str:
        """Element type of the linear maps' products."""
        return LINEAR_DTYPE[self.precision]

    @property
    def wide_dtype(self) -> str:
        """Element type of attention, head, and what stands in memory."""
        return {"fp8": "bf16", "int8": "bf16"}.get(self.precision, self.linear_dtype)

    @property
    def element_bytes(self) -> int:
        """Of an activation."""
        return 4 if self.precision == "f32" else 2

    @property
    def kv_heads(self) -> float:
        """Heads of keys and values on one device: where tensor has more parts than there are heads, each has a copy."""
        return max(self.model.n_kv_heads / self.layout.tensor, 1.0)
