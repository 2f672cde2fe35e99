"""XLA's flags: the one place where they are chosen, for runs and forecasts alike."""

from collections.abc import Mapping
from typing import Any

import jax


def _pipelined(*collectives: str) -> dict[str, Any]:
    """Options that move collectives of a loop's next or last iteration behind the compute of this one."""
    if jax.__version_info__ >= PIPELINE_MODES:
        return {f"xla_gpu_pipeline_{name}": "COLLECTIVE_PIPELINING_MODE_ON" for name in collectives}
    return {f"xla_gpu_enable_pipelined_{name}": True for name in collectives}


PIPELINE_MODES = (0, 11, 1)
"""The JAX whose XLA has three modes of pipelining where there was a switch."""

COLLECTIVES_IN_FLIGHT = 2 if jax.__version_info__ >= PIPELINE_MODES else 4
"""That the scheduler lets set out before it waits for the first. XLA's own is 1: where tensor's collectives stand
between every two products, the gather of the next layer's weights finds no place and is waited for. They still travel
one after another, on one stream (openxla/xla pull request 17749); of two that share more than one device XLA keeps the
order (pull request 19026). 4 is what marin-community/marin trains with on 64 GB200 (docs of its MoE launch, 2026-07);
which of 1 to 8 is best was simulated for each release: docs/forecast.md, How far to trust it."""

COMPILER_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    # Schedule communication behind compute; scatter the last layer's gradients while this layer computes.
    "gpu": {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # Not all-gathers: where tensor splits the sequence, each would take the layer before it along, and twice.
        **_pipelined("reduce_scatter", "all_reduce"),
        "xla_gpu_experimental_parallel_collective_overlap_limit": COLLECTIVES_IN_FLIGHT,
    },
    "tpu": {},
    "cpu": {},
}
"""The XLA flags of every run and every forecast, by platform."""

NO_TILES = "Couldn't find output tile sizes"
"""What XLA says of a GPU product that it fuses for Triton and then cannot tile: one transposed, by split heads."""

NO_TRITON: Mapping[str, Any] = {"xla_gpu_enable_triton_gemm": False}
"""All products are calls to cuBLAS."""


def compile_step(lowered: jax.stages.Lowered, options: Mapping[str, Any]) -> tuple[jax.stages.Compiled, dict[str, Any]]:
    """The program under these options beside its own, and the options that it took: where XLA cannot tile a product for
    Triton, all products are cuBLAS's. What the compiler refuses raises JaxRuntimeError."""
    taken = dict(options)
    try:
        return lowered.compile(compiler_options=taken), taken
    except jax.errors.JaxRuntimeError as error:
        if NO_TILES not in str(error):
            raise
    taken |= NO_TRITON
    return lowered.compile(compiler_options=taken), taken
