"""Bytes on one device by class, as the compiler laid them out."""

import math
from typing import Any

import jax

from experiments.step import TrainStep


def by_class(compiled: Any, step: TrainStep) -> dict[str, int]:
    """Classes that add up to "total", which is the compiler's own: arguments, outputs that reuse none
    of them, temporaries, code.

    params, optimizer: the state between steps; batch: tokens and counters; temporaries: activations,
    gradients, gathered weights, workspaces that the compiler plans; outputs; code.
    """
    stats = compiled.memory_analysis()
    params = _shard_bytes(step.abstract_state.params)
    optimizer = _shard_bytes(step.abstract_state.opt_state)
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
    return classes | {"total": sum(classes.values())}


def _shard_bytes(tree: Any) -> int:
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))
