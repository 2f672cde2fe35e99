"""Arrays at one place whose gradients are at another: custom gradients around sharding constraints.

A plain constraint holds for the gradient too, and asks for more of it than is needed.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Places = tuple[PartitionSpec, ...]
"""Where something passes, the last of them where it stays."""


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def placed(x: Array, mesh: Mesh, forward: Places, back: Places) -> Array:
    """x at one place and its gradient at another: what is gathered for use goes straight back to where it came from.

    A plain constraint would ask for the gradient gathered as well: an all-reduce where a reduce-scatter does (ZeRO,
    Rajbhandari et al. 2020, sec. 5; for activations Korthikanti et al. 2022, sec. 4.2.2). What is gathered is told
    where it comes from, or what it was before it was cast to 16 bit would travel.
    """
    return _through(x, mesh, forward)


def _through(x: Array, mesh: Mesh, places: Places) -> Array:
    for place in places:
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, place))
    return x


def _placed_forward(x: Array, mesh: Mesh, forward: Places, back: Places) -> tuple[Array, None]:
    return _through(x, mesh, forward), None


def _placed_backward(mesh: Mesh, forward: Places, back: Places, _: None, grad: Array) -> tuple[Array]:
    return (_through(grad, mesh, back),)


placed.defvjp(_placed_forward, _placed_backward)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def own(x: Array, shard: Any, dims: tuple[str, ...]) -> Array:
    """`Shard.own`, whose gradient is `Shard.summed`."""
    return _copies(x, shard, dims)


def _copies(x: Array, shard: Any, dims: tuple[str, ...]) -> Array:
    copies = jnp.broadcast_to(x[None, None], (shard.batch_shards, shard.context_shards, *x.shape))
    return shard.activation(copies, "batch", "length", *dims)


def _own_forward(x: Array, shard: Any, dims: tuple[str, ...]) -> tuple[Array, None]:
    return _copies(x, shard, dims), None


def _own_backward(shard: Any, dims: tuple[str, ...], _: None, grad: Array) -> tuple[Array]:
    return (shard.summed(grad, *dims),)


own.defvjp(_own_forward, _own_backward)
