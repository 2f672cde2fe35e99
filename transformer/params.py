"""Parameters described once: from one table come shapes, initial values, dims and so shardings and counts."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from transformer.config import ModelConfig, Weights

Initializer = Callable[..., Array]
Params = Mapping[str, Array]

normal: Callable[[float], Initializer] = jax.nn.initializers.normal
zeros: Initializer = jax.nn.initializers.zeros
ones: Initializer = jax.nn.initializers.ones


class Param(NamedTuple):
    """One parameter: its shape, a name per dim (never a mesh axis), its initial values."""

    shape: tuple[int, ...]
    dims: tuple[str, ...]
    init: Initializer


ParamTree = Mapping[str, Any]  # nested: the leaves are Param


def weight(
    config: ModelConfig, shape: tuple[int, ...], dims: tuple[str, ...], *, fan_in: int, fan_out: int,
    residual: bool = False, queries: bool = False,
) -> Param:  # fmt: skip
    """A matrix with the initial values that its model was published with.

    normal: N(0, std^2). residual: the same, maps back to the residual stream divided by sqrt(2 n_layers), which
    keeps the stream's variance over depth (GPT-2). truncated: N(0, std^2) cut at 2 std (BERT). xavier: uniform
    within sqrt(6 / (fan_in + fan_out)) (Glorot & Bengio 2010; Tensor2Tensor's Transformer). fan_in: N(0, 1 / fan_in)
    (PaLM, sec. 5). t5: the same, and queries divided by sqrt(d_head), for T5 does not scale scores.
    """
    std = config.init_std
    match config.init:
        case "normal":
            init = normal(std)
        case "residual":
            init = normal(std / (2 * config.n_layers) ** 0.5 if residual else std)
        case "truncated":
            init = jax.nn.initializers.truncated_normal(std)
        case "xavier":
            bound = (6 / (fan_in + fan_out)) ** 0.5
            init = _uniform(bound)
        case "fan_in":
            init = normal(fan_in**-0.5)
        case "t5":
            init = normal((fan_in * (config.d_head if queries else 1)) ** -0.5)
    return Param(shape, dims, init)


def embedding(config: ModelConfig, rows: int, dim: str) -> Param:
    """A table of `rows` vectors: N(0, 1) for PaLM and T5, N(0, 1 / d_model) for the original, else as matrices."""
    D = config.d_model
    std = {"fan_in": 1.0, "t5": 1.0, "xavier": D**-0.5}.get(config.init, config.init_std)
    init = jax.nn.initializers.truncated_normal(std) if config.init == "truncated" else normal(std)
    return Param((rows, D), (dim, "embed"), init)


def _uniform(bound: float) -> Initializer:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def declare(module: nn.Module, table: Mapping[str, Param]) -> dict[str, Array]:
    """The module's parameters, float32 when initialised; as given when applied."""
    return {name: module.param(name, p.init, p.shape, jnp.float32) for name, p in table.items()}


def stacked(tree: ParamTree, n: int, dim: str) -> dict[str, Any]:
    """The same table with a leading dim of size n, as `nn.scan` stores it."""
    return map_params(lambda p: Param((n, *p.shape), (dim, *p.dims), p.init), tree)


def map_params(function: Callable[[Param], Any], tree: ParamTree) -> dict[str, Any]:
    """Apply to every leaf of a table."""
    return {k: function(v) if isinstance(v, Param) else map_params(function, v) for k, v in tree.items()}


def dtype_of(name: str, weights: Weights) -> np.dtype:
    """Of a parameter between steps: what routers have, whose scores rank, is float32 in any case."""
    return np.dtype(jnp.bfloat16 if weights == "bf16" and not name.endswith("_router") else jnp.float32)


def leaves(tree: ParamTree, path: str = "") -> Iterator[tuple[str, Param]]:
    """Every leaf with its path, such as ("layers/attention/w_q", Param(...))."""
    for name, value in tree.items():
        if isinstance(value, Param):
            yield f"{path}{name}", value
        else:
            yield from leaves(value, f"{path}{name}/")
