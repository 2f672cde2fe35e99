"""Parameters described once: from one table come shapes, initial values, dims and so shardings and counts."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

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


def declare(module: nn.Module, table: Mapping[str, Param]) -> dict[str, Array]:
    """The module's parameters, float32 when initialised; as given when applied."""
    return {name: module.param(name, p.init, p.shape, jnp.float32) for name, p in table.items()}


def stacked(tree: ParamTree, n: int, dim: str) -> dict[str, Any]:
    """The same table with a leading dim of size n, as `nn.scan` stores it."""
    return map_params(lambda p: Param((n, *p.shape), (dim, *p.dims), p.init), tree)


def map_params(function: Callable[[Param], Any], tree: ParamTree) -> dict[str, Any]:
    """Apply to every leaf of a table."""
    return {k: function(v) if isinstance(v, Param) else map_params(function, v) for k, v in tree.items()}


def leaves(tree: ParamTree, path: str = "") -> Iterator[tuple[str, Param]]:
    """Every leaf with its path, such as ("layers/attention/w_q", Param(...))."""
    for name, value in tree.items():
        if isinstance(value, Param):
            yield f"{path}{name}", value
        else:
            yield from leaves(value, f"{path}{name}/")
