"""Where tensors live. Dims are named in the model, axes in the mesh; two tables here join them.

*Axis* is said of the mesh, *dim* of a tensor. Parameters are stored by one table and computed with
by another: what `fsdp` splits in storage is gathered for use, and its gradient is scattered back.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from transformer.errors import RequestError, nearest
from transformer.params import Param, ParamTree, map_params
from transformer.placement import own, placed

AXES = ("slice", "pipeline", "data", "fsdp", "expert", "context", "tensor")
"""Mesh axes, outermost first, so that what talks most lies closest.

slice     replicas in different pods, joined by slow links: only gradients cross, once
pipeline  stages of layers, through which microbatches pass
data      replicas: different sequences, the same parameters
fsdp      different sequences; parameters, gradients and optimizer split by ZeRO stage
expert    different sequences, and different experts of every mixture
context   parts of every sequence
tensor    parts of every layer, and of the sequence between layers; stays within a node
"""

Rules = Mapping[str, str | tuple[str, ...] | None]

DIMS = (
    "batch", "expert_batch", "length", "sequence", "layers", "embed", "expert_embed", "latent", "kv_heads", "group",
    "head", "ffn", "experts", "vocab", "position", "channel",
)  # fmt: skip
"""Names of dims. embed: the residual stream; expert_embed: the same as a side of an expert's matrix; latent: what
latent attention's queries, keys and values pass through, as the inner side of the maps out of it; length: positions
within a layer, sequence: positions between layers; batch: sequences, expert_batch: sequences where experts meet them;
channel: any other that no axis splits."""

PARAMETER_RULES: Rules = {
    "embed": ("fsdp", "expert", "context"), "expert_embed": ("fsdp", "context"),
    "latent": ("fsdp", "expert", "context"), "experts": "expert", "layers": "pipeline",
    "kv_heads": "tensor", "ffn": "tensor", "vocab": ("pipeline", "tensor"),
}  # fmt: skip
"""Storage: every matrix is split along the residual stream over the axes whose devices hold other tokens, but for
replicas, and over tensor along its other side."""

MATRIX_DIMS = ("embed", "expert_embed", "latent")
"""What every matrix has as one of its sides, and no vector: so weight decay knows which is which."""

ACTIVATION_RULES: Rules = {
    "batch": ("slice", "data", "fsdp", "expert"), "expert_batch": ("slice", "data", "fsdp"), "length": "context",
    "sequence": ("context", "tensor"), "experts": "expert", "layers": "pipeline", "kv_heads": "tensor", "ffn": "tensor",
    "vocab": ("pipeline", "tensor"),
}  # fmt: skip
"""Compute: sequences over replicas, fsdp and expert; their positions over context, and between layers over tensor
too (Korthikanti et al. 2022, sec. 4.2.2); heads and hidden units over tensor; weights lose their fsdp split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Sizes of the mesh axes, whose product is the number of devices, and how some of them are used."""

    slice: int = 1
    pipeline: int = 1
    data: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    zero: int = 3
    """What fsdp splits (Rajbhandari et al. 2020): the optimizer (1), gradients too (2), parameters too (3)."""
    repeats: int = 1
    """Parts of the model that a pipeline stage has: microbatches pass through all stages so often."""
    ring: int = 0
    """Keys and values of other parts of the context pass around a ring (1), or are gathered before (0)."""

    def __str__(self) -> str:
        """As a request has it: what is not as without it."""
        fields = dataclasses.fields(self)
        return (
            ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields if getattr(self, f.name) != f.default)
            or "data=1"
        )

    @property
    def n_devices(self) -> int:
        return math.prod(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the axes, in their order."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def shape(self) -> dict[str, int]:
        """Of the mesh."""
        return dict(zip(AXES, self.sizes, strict=True))

    @property
    def data_shards(self) -> int:
        """Groups of devices that hold different sequences."""
        return self.slice * self.data * self.fsdp * self.expert

    def split(self, entry: str | tuple[str, ...] | None) -> int:
        """In how many parts the axes of a rule split a dim."""
        return math.prod(getattr(self, axis) for axis in axes_of(entry))


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes of one dim's rule."""
    return (entry,) if isinstance(entry, str) else entry or ()


def make_mesh(layout: Layout, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The one place where a mesh is made: axes in the order of AXES, Auto, over the first n devices."""
    devices = jax.devices() if devices is None else devices
    if layout.n_devices > len(devices):
        raise RequestError(f"layout {layout} needs {layout.n_devices} devices, {len(devices)} are attached")
    return jax.make_mesh(
        layout.sizes, AXES, devices=devices[: layout.n_devices], axis_types=(AxisType.Auto,) * len(AXES)
    )


def spec(dims: Sequence[str], rules: Rules) -> PartitionSpec:
    """The mesh axes of a tensor's dims. An unknown dim raises, and so do two dims on one axis."""
    axes = []
    for dim in dims:
        if dim not in DIMS:
            raise RequestError(f"unknown dim {dim!r}: {nearest(dim, DIMS)}")
        axes.append(rules.get(dim))
    used = [axis for entry in axes for axis in axes_of(entry)]
    if len(used) != len(set(used)):
        raise RequestError(f"dims {tuple(dims)} put two dims on one mesh axis: {axes}")
    return PartitionSpec(*axes)


def param_spec(param: Param, shape: Mapping[str, int], rules: Rules = PARAMETER_RULES) -> PartitionSpec:
    """The mesh axes of a parameter's dims, on a mesh of that shape. Layers that do not divide among the stages of a
    pipeline are split along the residual stream instead, where that divides, and meet their stages once a step."""
    sizes = dict(zip(param.dims, param.shape, strict=True))
    if sizes.get("layers", 0) % shape["pipeline"] == 0:
        return spec(param.dims, rules)
    return along_stream(param, shape, rules)


def along_stream(param: Param, shape: Mapping[str, int], rules: Rules = PARAMETER_RULES) -> PartitionSpec:
    """A parameter with all its layers in one place, split over the pipeline along the residual stream."""
    sizes = dict(zip(param.dims, param.shape, strict=True))
    along = {dim: ("pipeline", *axes_of(rules.get(dim))) for dim in MATRIX_DIMS if dim in sizes}
    fits = {dim: axes for dim, axes in along.items() if sizes[dim] % math.prod(shape[axis] for axis in axes) == 0}
    return spec(param.dims, {**rules, **fits, "layers": None})


Dims = tuple[str, ...]


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

    def gradients(self, grads: Mapping[str, Any], tree: ParamTree) -> Mapping[str, Any]:
        """Gradients of parameters, where `weights` leaves them."""
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

    def gradients(self, grads: Mapping[str, Any], tree: ParamTree) -> Mapping[str, Any]:
        return grads

    def local(self, function: Callable[..., Array], dims: Sequence[Any], out_dims: Dims) -> Callable[..., Array]:
        return function


UNSHARDED = Unsharded()

REPLICAS = ("slice", "data", "fsdp")
"""Axes of devices that hold other sequences and, once gathered, the same parameters."""


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
    def expert_shards(self) -> int:
        return self._parts("experts")

    def activation(self, x: Array, *dims: str) -> Array:
        assert x.ndim == len(dims), (x.shape, dims)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec(dims, self.rules)))

    def enter(self, x: Array) -> Array:
        together, apart = self._streams
        return placed(x, self.mesh, (apart, together), (apart,))

    def leave(self, x: Array) -> Array:
        together, apart = self._streams
        return placed(x, self.mesh, (apart,), (apart, together))

    def own(self, x: Array, *dims: str) -> Array:
        return own(x, self, dims)

    def summed(self, x: Array, *dims: str) -> Array:
        """Scattered over those that store it apart before replicas add theirs, or these would send all of it. Not by
        `sum`, which would make float32 of it first."""
        axes = axes_of(self.rules["batch"])
        replicas = tuple(axis for axis in axes if axis not in axes_of(PARAMETER_RULES["embed"]))
        place = spec(dims, self.rules if self.of_one else PARAMETER_RULES)
        n = math.prod(self.mesh.shape[axis] for axis in replicas)
        x = self.activation(x, "batch", "length", *dims).reshape(n, -1, *x.shape[1:])
        x = jax.lax.reduce(x, jnp.zeros((), x.dtype), jax.lax.add, (1, 2))
        x = jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(replicas, *place)))
        x = jax.lax.reduce(x, jnp.zeros((), x.dtype), jax.lax.add, (0,))
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, place))

    @property
    def _streams(self) -> tuple[PartitionSpec, PartitionSpec]:
        """The stream within a layer, and between layers."""
        within, between = (spec(("batch", length, "embed"), self.rules) for length in ("length", "sequence"))
        return within, between

    def weights(self, params: Mapping[str, Array], table: Mapping[str, Param]) -> Mapping[str, Array]:
        return {
            name: placed(w, self.mesh, (self._spec(table[name], self.rules),), (self._spec(table[name], self._stored),))
            for name, w in params.items()
        }

    def gradients(self, grads: Mapping[str, Any], tree: ParamTree) -> dict[str, Any]:
        """Gradients where `weights` leaves them."""
        return {
            name: jax.lax.with_sharding_constraint(g, NamedSharding(self.mesh, self._spec(part, self._stored)))
            if isinstance(part := tree[name], Param)
            else self.gradients(g, part)
            for name, g in grads.items()
        }

    @property
    def _stored(self) -> Rules:
        return self.rules if self.of_one else PARAMETER_RULES

    def _spec(self, param: Param, rules: Rules) -> PartitionSpec:
        return param_spec(param, self.mesh.shape, rules)

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


def context_order(length: int, parts: int) -> np.ndarray:
    """The place of each position where a sequence is split in `parts`: of twice as many chunks, the i-th part has the
    i-th and the i-th from the end, so that under a causal mask all parts see as much.

    >>> context_order(8, 2).tolist(), context_order(3, 1).tolist()
    ([0, 1, 6, 7, 2, 3, 4, 5], [0, 1, 2])
    """
    if parts == 1:
        return np.arange(length)
    chunks = np.arange(length).reshape(2 * parts, -1)
    return np.concatenate([np.concatenate([chunks[i], chunks[-1 - i]]) for i in range(parts)])


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


def param_shardings(tree: ParamTree, mesh: Mesh) -> dict:
    """A NamedSharding for every parameter, in the shape of the table."""
    return map_params(lambda p: NamedSharding(mesh, param_spec(p, mesh.shape)), tree)
