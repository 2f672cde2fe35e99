"""Matrix products: of linear maps, in 16 or 8 bit; and of 16-bit numbers whose results are float32 and gradients as
fast as they are.

In 8 bit both factors are scaled by their largest entry, as it is now (current scaling), rounded, multiplied with 32-bit
sums, and scaled back (Micikevicius et al. 2022, FP8 Formats for Deep Learning):

    fp8     values and weights e4m3 (3 bits of fraction), gradients e5m2 (2 bits, wider range); one scale a tensor;
            all three products of a map in 8 bit
    int8    one scale a token and one an output; gradients pass as if nothing had been rounded (Bengio et al. 2013,
            straight-through), and are multiplied in 16 bit

A scale is of the whole tensor, over all devices that share it, so that it does not depend on the layout.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from transformer.config import Precision

Linear = Callable[[str, Array, Array, str], Array]
"""`linear` at some precision."""


def linear(equation: str, x: Array, w: Array, name: str, *, precision: Precision = "bf16") -> Array:
    """A linear map of x: the one place where a layer's weights are multiplied. `name`: of the result, by which
    rematerialisation chooses its fate (`remat.TENSORS`). At bf16 and f32 it is of whatever type its factors are."""
    return checkpoint_name(product(equation, x, w, precision), name)


def product(equation: str, x: Array, w: Array, precision: Precision) -> Array:
    """einsum of values and weights, in x's dtype."""
    return _narrow(equation, precision, x, w) if precision in ("fp8", "int8") else jnp.einsum(equation, x, w)


class Scaled(NamedTuple):
    """8-bit values, of which `scale` times is meant; it has one number, or a dim of size 1 for each that it spans."""

    values: Array
    scale: Float[Array, "..."]


def scaled(x: Array, dtype: Any, dims: tuple[int, ...] | None = None) -> Scaled:
    """x in an 8-bit type whose largest value stands for the largest entry along `dims`, by default of all. Zeros stay
    zeros."""
    info: Any = jnp.iinfo(dtype) if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype)
    largest = jnp.abs(x).max(dims, keepdims=dims is not None).astype(jnp.float32)
    scale = jnp.where(largest > 0, largest, 1.0) / float(info.max)
    values = x.astype(jnp.float32) / scale
    return Scaled((jnp.round(values) if dtype == jnp.int8 else values).astype(dtype), scale)


def gradients(
    equation: str, x: Any, w: Any, dy: Array, precision: Precision, dtype: Any = jnp.float32
) -> tuple[Array, Array]:
    """Of a product's factors, the second in `dtype`: both are sums of products with dy. `x` and `w` may be `Scaled`."""
    factors, out = equation.split("->")
    of_x, of_w = factors.split(",")
    to_x, to_w = f"{out},{of_w}->{of_x}", f"{of_x},{out}->{of_w}"
    if precision != "fp8":
        return jnp.einsum(to_x, dy, w), jnp.einsum(to_w, x, dy, preferred_element_type=dtype)
    x, w = (t if isinstance(t, Scaled) else scaled(t, jnp.float8_e4m3fn) for t in (x, w))
    dy8 = scaled(dy, jnp.float8_e5m2)
    return _dot(to_x, dy8, w, dy.dtype), _dot(to_w, x, dy8, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _narrow(equation: str, precision: Precision, x: Array, w: Array) -> Array:
    return _narrow_forward(equation, precision, x, w)[0]


def _narrow_forward(equation: str, precision: Precision, x: Array, w: Array) -> tuple[Array, Any]:
    like = jnp.zeros((), w.dtype)
    if precision == "fp8":
        x8, w8 = scaled(x, jnp.float8_e4m3fn), scaled(w, jnp.float8_e4m3fn)
        return _dot(equation, x8, w8, x.dtype), (x8, w8, like)
    of_x, of_w, out = equation.replace("->", ",").split(",")
    x8, w8 = (
        scaled(t, jnp.int8, tuple(i for i, d in enumerate(dims) if d not in out)) for t, dims in ((x, of_x), (w, of_w))
    )
    return _dot(equation, x8, w8, x.dtype), (x, w, like)


def _narrow_backward(equation: str, precision: Precision, kept: Any, dy: Array) -> tuple[Array, Array]:
    x, w, like = kept
    return gradients(equation, x, w, dy, precision, like.dtype)


_narrow.defvjp(_narrow_forward, _narrow_backward)


def _dot(equation: str, a: Scaled, b: Scaled, dtype: Any) -> Array:
    """einsum of two 8-bit arrays, whose types may differ. Every index is one of the result or of both.

    Sums of fp8 are rounded to `dtype` before they are scaled back: so they are when devices add theirs up."""
    of_a, of_b, out = equation.replace("->", ",").split(",")
    batch = [d for d in of_a if d in of_b and d in out]
    summed = [d for d in of_a if d not in out]
    dims: Any = tuple(([*map(of_a.index, names)], [*map(of_b.index, names)]) for names in (summed, batch))
    sums = jnp.int32 if a.values.dtype == jnp.int8 else dtype
    y = jax.lax.dot_general(a.values, b.values, dims, preferred_element_type=sums).astype(jnp.float32)
    made = batch + [d for d in of_a if d not in (*batch, *summed)] + [d for d in of_b if d not in (*batch, *summed)]
    y = y.transpose([made.index(d) for d in out])
    return (y * (_spread(a.scale, of_a, out) * _spread(b.scale, of_b, out))).astype(dtype)


def _spread(scale: Array, dims: str, out: str) -> Array:
    """A scale with the dims of a result."""
    if not scale.ndim:
        return scale
    there = "".join(d for d in dims if d in out)
    scale = jnp.einsum(
        f"{there}->{''.join(d for d in out if d in there)}", scale.reshape([scale.shape[dims.index(d)] for d in there])
    )
    sizes = iter(scale.shape)
    return scale.reshape([next(sizes) if d in there else 1 for d in out])


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
