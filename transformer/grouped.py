"""The product of many experts' rows with their matrices as one kernel, forward and backward, and where that can be.

The kernels (`hopper.py`) are of NVIDIA's Hopper. By itself XLA makes of `jax.lax.ragged_dot` on GPUs one product over
all experts. JAX has a kernel for Blackwell too, but none of the weights' gradient there.
"""

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer.backends import Chip
from transformer.config import ExpertProducts, ModelConfig, Precision
from transformer.errors import RequestError

HOPPER = (9, 0)
"""Compute capability of the GPUs that the kernels are for: their instructions are of no other generation."""

WIDTH = 64
"""What a matrix's sides must be multiples of: the smallest tile."""

ROWS = "multiplies_{}_of_{}_rows"
"""The scope that a kernel runs in: rows that are likely to be multiplied, for who reads the program, where the kernel
says nothing of its work."""


def supports(config: ModelConfig, *, chip: Chip, precision: Precision, tensor: int) -> str | None:
    """Why the kernels cannot multiply a model's experts, in a few words; None if they can. `tensor`: of the layout."""
    sides = [config.d_model, config.expert_size // tensor]
    lacks = {
        "needs dropless experts": not config.is_dropless,
        "needs a Hopper GPU": (chip.platform, chip.generation) != ("gpu", HOPPER),
        "multiplies in 16 bit": precision != "bf16",
        f"multiplies sides of {WIDTH}s, and here they are {sides[0]:,} and {sides[1]:,}": any(n % WIDTH for n in sides),
    }
    return next((reason for reason, lacking in lacks.items() if lacking), None)


def choose(
    asked: str, config: ModelConfig, *, chip: Chip, precision: Precision, tensor: int
) -> tuple[ExpertProducts, str]:
    """How dropless experts are multiplied, and why: by a loop unless the kernels are asked for, which no hardware has
    proven yet. RequestError where what is asked for cannot be."""
    lacks = supports(config, chip=chip, precision=precision, tensor=tensor)
    if asked == "grouped":
        if lacks:
            raise RequestError(f"--experts=grouped {lacks}; nearest: --experts=loop")
        return "grouped", "grouped: asked for"
    return "loop", f"loop: grouped {lacks}" if lacks else "loop: --experts=grouped is not proven on hardware yet"


class Tiles(NamedTuple):
    """Whose rows lie where. All tiles have as many, an expert's follow each other, those of none are the last."""

    expert_of: Int[Array, " n"]  # of each tile; E of those of none
    first: Int[Array, " E"]  # tile of each expert
    n_tiles: Int[Array, " E"]  # of each expert


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped_dot(n_rows: int, x: Float[Array, "M i"], w: Float[Array, "E i o"], tiles: Tiles) -> Float[Array, "M o"]:
    """Every row with its expert's matrix; `n_rows` of them are likely to have one. Rows of no expert are not read, and
    are garbage in the result, as in the gradient of x."""
    return _forward(n_rows, x, w, tiles)[0]


def _forward(n_rows: int, x: Array, w: Array, tiles: Tiles) -> tuple[Array, Any]:
    from transformer import hopper  # not on every machine can it be imported

    with jax.named_scope(ROWS.format(n_rows, len(x))):
        return hopper.rows_product(x, w, tiles.expert_of.astype(jnp.int32)), (x, w, tiles)


def _backward(n_rows: int, kept: Any, dy: Float[Array, "M o"]) -> tuple[Array, Array, None]:
    from transformer import hopper

    x, w, tiles = kept
    expert_of, first, n_tiles = (t.astype(jnp.int32) for t in tiles)
    with jax.named_scope(ROWS.format(n_rows, len(x))):
        dx = hopper.rows_product(dy, w, expert_of, turned=True)
        return dx, hopper.weights_product(x, dy, first, n_tiles, len(expert_of)), None


grouped_dot.defvjp(_forward, _backward)


def kernel_flops(scope: str, operands: Sequence[Any]) -> float:
    """FLOPs of a call in the scope of a kernel, of rows that are likely to be multiplied; 0 of any other."""
    found = re.search(ROWS.format(r"(\d+)", r"\d+"), scope)
    if not found:
        return 0.0
    *_, left, right = (a.shape for a in operands)
    sides = right[-2:] if len(right) > len(left) else (left[-1], right[-1])
    return 2.0 * int(found.group(1)) * math.prod(sides)
