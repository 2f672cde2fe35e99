"""Products of experts as two kernels for NVIDIA's Hopper GPUs, in Pallas: 16 bit, sums in float32.

    rows_product      y[i] = x[i] w[e], or x[i] of w[e] turned, for every row i of expert e
    weights_product   dw[e] = sum over the rows i of expert e of x[i] dy[i]

Rows lie in tiles, and a tile's rows are of one expert or of none. Those of none are neither read nor written: what is
there afterwards is garbage.

Made from JAX's own (`ragged_dot_mgpu` and `transposed_ragged_dot_mgpu` of `jax.experimental.pallas.ops.gpu`), whose
pipelines and sizes they have. There experts' rows border anywhere: every tile looks through the sizes of all experts,
as many tiles as there are experts are multiplied for nothing, and so are those of none; the second asks the process's
first device, which may be another than it is compiled for, how many multiprocessors it has.

Letters: M rows in n tiles; D, F widths, multiples of SIDES[-1]; E experts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

SIDES = (128, 64)
"""Of a tile of a result: the largest of these that divides its width."""

DEPTH = 64
"""Entries of the contracted dim that are multiplied at once; divides every side."""

STEPS = 4
"""Pairs of factors on their way into shared memory, which has room for six with a result."""

MULTIPROCESSORS = 132
"""Blocks of threads that share the tiles: one each on H100 SXM, H200 and GH200."""

NEIGHBOURS = 16
"""Tiles side by side, at most, that follow each other, so that the rows that they share stay in L2."""


def rows_product(
    x: Float[Array, "M k"], w: Float[Array, "E D F"], expert_of: Int[Array, " n"], *, turned: bool = False
) -> Float[Array, "M o"]:
    """Every row with its expert's matrix; `turned`, with its transpose. `expert_of` each tile, E where it is none's."""
    (n_rows, n_in), n_tiles, (n_experts, *sides) = x.shape, len(expert_of), w.shape
    n_out = sides[0 if turned else 1]
    high, wide = n_rows // n_tiles, _side(n_out)
    grid = n_tiles, n_out // wide

    def body(expert_of: Any, x: Any, w: Any, out: Any) -> None:
        @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="sm")
        def _(loop: Any) -> None:
            i, j = plgpu.planar_snake(loop.index[0], grid, 1, _neighbours(grid[1]))
            expert = expert_of[i]

            @pl.when(expert < n_experts)
            def _() -> None:
                def add(_: Any, left: Any, right: Any, total: Any) -> None:
                    plgpu.wgmma(total, left, right.T if turned else right)

                _store(
                    _summed(
                        add, (high, wide), n_in // DEPTH,
                        (x, (high, DEPTH), lambda k: (i, k)),
                        (w.at[expert], (wide, DEPTH), lambda k: (j, k))
                        if turned
                        else (w.at[expert], (DEPTH, wide), lambda k: (k, j)),
                    ),
                    out.at[pl.ds(i * high, high), pl.ds(j * wide, wide)],
                )  # fmt: skip

    return _kernel(body, (n_rows, n_out), x.dtype)(expert_of, x, w)


def weights_product(
    x: Float[Array, "M D"], dy: Float[Array, "M F"], first: Int[Array, " E"], count: Int[Array, " E"], n_tiles: int
) -> Float[Array, "E D F"]:
    """Of every expert the product of its rows, which fill `count` tiles from the `first` on; 0 where there are none."""
    (n_rows, n_left), n_right, n_experts = x.shape, dy.shape[1], len(first)
    high, wide, depths = _side(n_left), _side(n_right), n_rows // n_tiles // DEPTH
    grid = n_left // high, n_right // wide

    def body(first: Any, count: Any, x: Any, dy: Any, out: Any) -> None:
        @plgpu.nd_loop((n_experts, grid[0] * grid[1]), collective_axes="sm")
        def _(loop: Any) -> None:
            expert = loop.index[0]
            i, j = plgpu.planar_snake(loop.index[1], grid, 1, _neighbours(grid[1]))
            start = first[expert] * depths

            def add(_: Any, left: Any, right: Any, total: Any) -> None:
                plgpu.wgmma(total, left.T, right)

            total = _summed(
                add, (high, wide), count[expert] * depths,
                (x, (DEPTH, high), lambda k: (start + k, i)), (dy, (DEPTH, wide), lambda k: (start + k, j)),
            )  # fmt: skip
            _store(total, out.at[expert, pl.ds(i * high, high), pl.ds(j * wide, wide)])

    return _kernel(body, (n_experts, n_left, n_right), x.dtype)(first, count, x, dy)


def _side(width: int) -> int:
    return next(side for side in SIDES if width % side == 0)


def _neighbours(n_tiles: int) -> int:
    return max(n for n in range(1, NEIGHBOURS + 1) if n_tiles % n == 0)


def _kernel(body: Callable[..., None], shape: tuple[int, ...], dtype: Any) -> Callable[..., Array]:
    return plgpu.kernel(
        body, out_type=jax.ShapeDtypeStruct(shape, dtype), grid=(MULTIPROCESSORS,), grid_names=("sm",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )  # fmt: skip


def _summed(add: Callable[..., None], shape: tuple[int, int], depth: Any, *factors: tuple[Any, Any, Any]) -> Any:
    """A tile's sum of `depth` products. Of each factor: the array, the part that is multiplied at once, its place."""

    def total_of(total: Any) -> Any:
        @pl.when(depth > 0)
        def _() -> None:
            plgpu.emit_pipeline(
                lambda at, left, right: add(at, left, right, total), grid=(depth,), max_concurrent_steps=STEPS,
                in_specs=[plgpu.BlockSpec(part, place, delay_release=1) for _, part, place in factors],
            )(*(array for array, _, _ in factors))  # fmt: skip

        return total[...]

    return pl.run_scoped(total_of, plgpu.ACC(shape))  # pyright: ignore[reportPrivateImportUsage]


def _store(total: Any, out: Any) -> None:
    @partial(pl.run_scoped, tile=plgpu.SMEM(total.shape, dtype=out.dtype))
    def _(tile: Any) -> None:
        tile[...] = total.astype(out.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, out)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
