"""How a model's tensors get their places: `Shard` is what model code knows, `OnMesh` looks dims up in the two tables of
`sharding.py`."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from transformer.params import Param, ParamTree
from transformer.sharding import ACTIVATION_RULES, PARAMETER_RULES, REPLICAS, Dims, Rules, axes_of, param_spec, spec

Place = tuple[Dims, PartitionSpec]
"""The dims of a tensor and where a table puts them."""

Places = tuple[Place, ...]
"""Where something passes, the last of them where it stays."""


@runtime_checkable
class Shard(Protocol):
    """How a model asks for its tensors to be placed. Model code knows only this."""

    @property
    def batch_shards(self) -> int:
        """Groups of devices that hold different sequences."""
        ...

    @property
    def context_shards(self) -> int:
        """Parts that every sequence is split in."""
        ...

    @property
    def head_shards(self) -> int:
        """Groups of devices that hold different heads."""
        ...

    @property
    def expert_shards(self) -> int:
        """Groups of devices that hold different experts."""
        ...

    @property
    def ring(self) -> bool:
        """Whether keys and values pass around the parts of a sequence, and are not gathered."""
        ...

    def activation(self, x: Array, *dims: str) -> Array:
        """x, placed as the table of activations says."""
        ...

    def enter(self, x: Array) -> Array:
        """The stream [B, L, D] as a layer's maps read it: positions that lay apart between layers come together."""
        ...

    def leave(self, x: Array) -> Array:
        """What a layer's maps made [B, L, D], as it is between layers; its gradient comes together once."""
        ...

    def own(self, x: Array, *dims: str) -> Array:
        """x [*dims] for each that holds other tokens by itself [P, C, *dims], so that its gradient adds up there."""
        ...

    def summed(self, x: Array, *dims: str) -> Array:
        """What each has of `own` [P, C, *dims], added up as it is and once."""
        ...

    def weights(self, params: Mapping[str, Array], table: Mapping[str, Param]) -> Mapping[str, Array]:
        """Stored parameters, made ready for use."""
        ...

    def stored(self, arrays: Mapping[str, Any], tree: ParamTree) -> Mapping[str, Any]:
        """Parameters where `weights` takes them from, or gradients where it leaves them."""
        ...

    def local(self, function: Callable[..., Array], dims: Sequence[Any], out_dims: Dims) -> Callable[..., Array]:
        """`function` run by every device on its own part of the arguments, whose dims are given one by one, as a tree
        where an argument is one: for what the compiler cannot split by itself."""
        ...


@dataclass(frozen=True)
class Unsharded:
    """One device, or whatever the compiler makes of it."""

    batch_shards: int = 1
    context_shards: int = 1
    head_shards: int = 1
    expert_shards: int = 1
    ring: bool = False

    def activation(self, x: Array, *dims: str) -> Array:
        assert x.ndim == len(dims), (x.shape, dims)
        return x

    def enter(self, x: Array) -> Array:
        return x

    def leave(self, x: Array) -> Array:
        return x

    def own(self, x: Array, *dims: str) -> Array:
        return jnp.broadcast_to(x[None, None], (self.batch_shards, self.context_shards, *x.shape))

    def summed(self, x: Array, *dims: str) -> Array:
        return jax.lax.reduce(x, jnp.zeros((), x.dtype), jax.lax.add, (0, 1))

    def weights(self, params: Mapping[str, Array], table: Mapping[str, Param]) -> Mapping[str, Array]:
        return params

    def stored(self, arrays: Mapping[str, Any], tree: ParamTree) -> Mapping[str, Any]:
        return arrays

    def local(self, function: Callable[..., Array], dims: Sequence[Any], out_dims: Dims) -> Callable[..., Array]:
        return function


UNSHARDED = Unsharded()


@dataclass(frozen=True)
class OnMesh:
    """Placement on a mesh by the two tables. `of_one`: as each group of devices sees it that shares its sequences,
    where the groups are a dim that is mapped over. `ring`: as in Layout."""

    mesh: Mesh
    of_one: bool = False
    ring: bool = False

    @property
    def rules(self) -> Rules:
        """The table of activations."""
        if not self.of_one:
            return ACTIVATION_RULES
        return {d: tuple(a for a in axes_of(entry) if a not in REPLICAS) for d, entry in ACTIVATION_RULES.items()}

    def _parts(self, dim: str) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes_of(self.rules[dim]))

    @property
    def batch_shards(self) -> int:
        return self._parts("batch")

    @property
    def context_shards(self) -> int:
        return self._parts("length")

    @property
    def head_shards(self) -> int:
        return self._parts("heads")

    @property
    def expert_shards(self) -> int:
        return self._parts("experts")

    def activation(self, x: Array, *dims: str) -> Array:
        assert x.ndim == len(dims), (x.shape, dims)
        return at(x, self.mesh, _place(dims, self.rules))

    def enter(self, x: Array) -> Array:
        together, apart = self._streams
        return _placed(x, self.mesh, (apart, together), (apart,))

    def leave(self, x: Array) -> Array:
        together, apart = self._streams
        return _placed(x, self.mesh, (apart,), (apart, together))

    def own(self, x: Array, *dims: str) -> Array:
        return _own(x, self, dims)

    def summed(self, x: Array, *dims: str) -> Array:
        """Scattered over those that store it apart before replicas add theirs, or these would send all of it. Not by
        `sum`, which would make float32 of it first."""
        axes = axes_of(self.rules["batch"])
        replicas = tuple(axis for axis in axes if axis not in axes_of(PARAMETER_RULES["embed"]))
        place = _place(dims, self._stored)
        n = math.prod(self.mesh.shape[axis] for axis in replicas)
        x = self.activation(x, "batch", "length", *dims).reshape(n, -1, *x.shape[1:])
        x = jax.lax.reduce(x, jnp.zeros((), x.dtype), jax.lax.add, (1, 2))
        x = at(x, self.mesh, (("batch", *dims), PartitionSpec(replicas, *place[1])))
        x = jax.lax.reduce(x, jnp.zeros((), x.dtype), jax.lax.add, (0,))
        return at(x, self.mesh, place)

    @property
    def _streams(self) -> tuple[Place, Place]:
        """The stream within a layer, and between layers."""
        within, between = (_place(("batch", length, "embed"), self.rules) for length in ("length", "sequence"))
        return within, between

    def weights(self, params: Mapping[str, Array], table: Mapping[str, Param]) -> Mapping[str, Array]:
        return {
            name: _placed(
                w, self.mesh, (self._place(table[name], self.rules),), (self._place(table[name], self._stored),)
            )
            for name, w in params.items()
        }

    def stored(self, arrays: Mapping[str, Any], tree: ParamTree) -> dict[str, Any]:
        return {
            name: at(a, self.mesh, self._place(part, self._stored))
            if isinstance(part := tree[name], Param)
            else self.stored(a, part)
            for name, a in arrays.items()
        }

    @property
    def _stored(self) -> Rules:
        return self.rules if self.of_one else PARAMETER_RULES

    def _place(self, param: Param, rules: Rules) -> Place:
        return param.dims, param_spec(param, self.mesh.shape, rules)

    def local(self, function: Callable[..., Array], dims: Sequence[Any], out_dims: Dims) -> Callable[..., Array]:
        specs: Any = _map_dims(lambda d: spec(d, self.rules), tuple(dims))
        # check_vma: a kernel's results do not say along which axes they vary.
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=specs, out_specs=spec(out_dims, self.rules), check_vma=False
        )


def _map_dims(function: Callable[[Dims], Any], tree: Any) -> Any:
    """Over the dims of a tree of arrays: tuples of names are its leaves."""

    def is_dims(t: Any) -> bool:
        return isinstance(t, tuple) and all(isinstance(name, str) for name in t)

    return jax.tree.map(function, tree, is_leaf=is_dims)


def _place(dims: Sequence[str], rules: Rules) -> Place:
    return tuple(dims), spec(dims, rules)


def at(x: Array, mesh: Mesh, *places: Place) -> Array:
    """x at its places, one after another. The dims go into the program as the name of a scope, so that whoever reads
    the compiled one, or the compiler's warnings, knows the tensor: "layer_0/[batch,sequence,embed]"."""
    for dims, axes in places:
        with jax.named_scope(f"[{','.join(dims)}]"):
            x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, axes))
    return x


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _placed(x: Array, mesh: Mesh, forward: Places, back: Places) -> Array:
    """x at one place and its gradient at another: what is gathered for use goes straight back to where it came from.

    A plain constraint would ask for the gradient gathered as well: an all-reduce where a reduce-scatter does (ZeRO,
    Rajbhandari et al. 2020, sec. 5; for activations Korthikanti et al. 2022, sec. 4.2.2). What is gathered is told
    where it comes from, or what it was before it was cast to 16 bit would travel.
    """
    return at(x, mesh, *forward)


def _placed_forward(x: Array, mesh: Mesh, forward: Places, back: Places) -> tuple[Array, None]:
    return at(x, mesh, *forward), None


def _placed_backward(mesh: Mesh, forward: Places, back: Places, _: None, grad: Array) -> tuple[Array]:
    return (at(grad, mesh, *back),)


_placed.defvjp(_placed_forward, _placed_backward)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _own(x: Array, shard: OnMesh, dims: Dims) -> Array:
    copies = jnp.broadcast_to(x[None, None], (shard.batch_shards, shard.context_shards, *x.shape))
    return shard.activation(copies, "batch", "length", *dims)


def _own_forward(x: Array, shard: OnMesh, dims: Dims) -> tuple[Array, None]:
    return _own(x, shard, dims), None


def _own_backward(shard: OnMesh, dims: Dims, _: None, grad: Array) -> tuple[Array]:
    return (shard.summed(grad, *dims),)


_own.defvjp(_own_forward, _own_backward)


def gathered(params: Mapping[str, Any], tree: ParamTree, mesh: Mesh) -> dict[str, Any]:
    """All stored parameters at once as layers use them, where they are not gathered layer by layer. Their gradients
    go back to where they are stored."""
    shard = OnMesh(mesh)
    return {
        name: shard.weights({name: params[name]}, {name: part})[name]
        if isinstance(part, Param)
        else gathered(params[name], part, mesh)
        for name, part in tree.items()
    }
