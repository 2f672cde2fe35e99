"""Products in 8 bit: near those in float32, and where they cannot be, as near as their types allow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.products import gradients, product, scaled

EQUATIONS = {
    "bld,dkgh->blkgh": ((3, 5, 16), (16, 2, 3, 4)), "blkgv,kgvd->bld": ((3, 5, 2, 3, 4), (2, 3, 4, 16)),
    "becd,edf->becf": ((2, 3, 5, 16), (3, 16, 7)), "bi,io->bo": ((4, 16), (16, 5)),
}  # fmt: skip
TOLERANCE = {"fp8": 5e-2, "int8": 1e-2}  # of the root mean square; e4m3 rounds by at most 1 / 16, int8 by 1 / 254
GRADIENT = {"fp8": 7e-2, "int8": 1e-6}  # e5m2 rounds by at most 1 / 8; int8's gradients are not rounded


def draw(equation: str):
    of_x, of_w = EQUATIONS[equation]
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], of_x) * 30, jax.random.normal(keys[1], of_w) * 1e-3
    return x, w, jax.random.normal(keys[2], jnp.einsum(equation, x, w).shape) * 1e-5


def distance(got, want) -> float:
    """Root mean square of the difference over that of what is wanted."""
    return float(np.sqrt(np.mean(np.square(got - want)) / np.mean(np.square(want))))


@pytest.mark.parametrize("precision", ["fp8", "int8"])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_products_and_gradients_are_near_those_of_float32(equation, precision):
    x, w, dy = draw(equation)
    got, back = jax.vjp(lambda x, w: product(equation, x, w, precision), x, w)
    want, back32 = jax.vjp(lambda x, w: product(equation, x, w, "f32"), x, w)
    for a, b, most in zip((got, *back(dy)), (want, *back32(dy)), (TOLERANCE, GRADIENT, GRADIENT), strict=True):
        assert distance(a, b) < most[precision]
    for a, b in zip(gradients(equation, x, w, dy, precision), back(dy), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_largest_entry_and_zeros_are_kept():
    x = jnp.asarray([[0.0, 3.0, -7.0], [0.0, 0.0, 0.0]])
    for dtype, dims in ((jnp.float8_e4m3fn, None), (jnp.float8_e5m2, None), (jnp.int8, (1,))):
        values, scale = scaled(x, dtype, dims)
        back = values.astype(jnp.float32) * scale
        assert float(back[0, 2]) == pytest.approx(-7.0)
        assert not back[1].any()
        assert not back[:, 0].any()
