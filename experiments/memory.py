"""Bytes on one device by class, as the compiler laid them out."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax

from experiments.step import TrainStep


@dataclass(frozen=True)
class Stats:
    """XLA's own figures of one device, as `compiled.memory_analysis()` has them."""

    argument_size_in_bytes: int
    output_size_in_bytes: int
    alias_size_in_bytes: int
    temp_size_in_bytes: int
    generated_code_size_in_bytes: int
    host_argument_size_in_bytes: int
    host_output_size_in_bytes: int
    host_alias_size_in_bytes: int
    host_temp_size_in_bytes: int

    @classmethod
    def of(cls, analysis: Any) -> "Stats":
        return cls(*(getattr(analysis, field.name) for field in dataclasses.fields(cls)))


def by_class(stats: Stats, step: TrainStep) -> dict[str, int]:
    """Classes that add up to "total", which is the compiler's own: arguments, outputs that reuse none
    of them, temporaries, code. Beside them "host": what lies in the host's memory for this device.

    params, optimizer: the state between steps; batch: tokens and counters; temporaries: activations,
    gradients, gathered weights, workspaces that the compiler plans; outputs; code.
    """
    params, optimizer = (
        _bytes(getattr(step.abstract_state, p), getattr(step.in_host, p)) for p in ("params", "opt_state")
    )
    host = stats.host_argument_size_in_bytes + stats.host_temp_size_in_bytes
    host += stats.host_output_size_in_bytes - stats.host_alias_size_in_bytes
    classes = {
        "params": params,
        "optimizer": optimizer,
        "batch": stats.argument_size_in_bytes
        - params
        - optimizer,  # the compiler pads small arrays: its count, not ours
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    return classes | {"total": sum(classes.values()), "host": host}


def _bytes(tree: Any, in_host: Any) -> int:
    """Of one device's parts of a tree's arrays, but for those in the host's memory."""
    arrays = zip(jax.tree.leaves(tree), jax.tree.leaves(in_host), strict=True)
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a, hosted in arrays if not hosted)
