"""Matrix products: of linear maps, and of 16-bit numbers whose results are float32 and gradients as fast as they are."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float


def linear(equation: str, x: Array, w: Array, name: str) -> Array:
    """A linear map of x: the one place where a layer's weights are multiplied. `name`: of the result, by which
    rematerialisation chooses its fate (`remat.TENSORS`)."""
    return checkpoint_name(jnp.einsum(equation, x, w), name)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def to_float32(equation: str, a: Array, b: Array) -> Float[Array, "*any"]:
    """einsum with a float32 result, for scores and logits.

    Its gradient is rounded to what a and b are, as fused kernels do (Dao 2023, sec. 3.1): by itself it would be
    multiplied in float32, at half the rate of 16 bit or less. Every index of `equation` must be one of the result or
    of both factors."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _forward(equation: str, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return to_float32(equation, a, b), (a, b)


def _backward(equation: str, kept: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    a, b = kept
    factors, result = equation.split("->")
    of_a, of_b = factors.split(",")
    d_a = jnp.einsum(f"{result},{of_b}->{of_a}", grad.astype(a.dtype), b)
    return d_a, jnp.einsum(f"{result},{of_a}->{of_b}", grad.astype(b.dtype), a)


to_float32.defvjp(_forward, _backward)
