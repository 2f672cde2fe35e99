"""Where tensors live. Dims are named in the model, axes in the mesh; two tables here join them.

*Axis* is said of the mesh, *dim* of a tensor. Parameters are stored by one table and computed with
by another: what `fsdp` splits in storage is gathered for use, and its gradient is scattered back.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from transformer.errors import RequestError, nearest
from transformer.params import Param, ParamTree, leaves, map_params

AXES = ("data", "fsdp", "tensor")  # outermost first: tensor stays within a node
"""Mesh axes. data: replicas; fsdp: data parallel with parameters and optimizer split, ZeRO-3; tensor: within layers."""

Rules = Mapping[str, str | tuple[str, ...] | None]

DIMS = (
    "batch", "length", "layers", "embed", "latent", "kv_heads", "group", "head", "ffn", "experts", "vocab",
    "position", "channel",
)  # fmt: skip
"""Names of dims. embed: the residual stream; latent: what latent attention's queries, keys and values pass through,
as the inner side of the maps out of it; channel: any other that no axis splits."""

PARAMETER_RULES: Rules = {"embed": "fsdp", "latent": "fsdp", "kv_heads": "tensor", "ffn": "tensor", "vocab": "tensor"}
"""Storage: every matrix is split over fsdp along the residual stream and over tensor along its other side."""

MATRIX_DIMS = ("embed", "latent")
"""What every matrix has as one of its sides, and no vector: so weight decay knows which is which."""

ACTIVATION_RULES: Rules = {"batch": ("data", "fsdp"), "kv_heads": "tensor", "ffn": "tensor", "vocab": "tensor"}
"""Compute: sequences over data and fsdp, heads and hidden units over tensor; weights lose their fsdp split."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the mesh axes. The product is the number of devices."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def n_devices(self) -> int:
        return math.prod(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def data_shards(self) -> int:
        """Groups of devices that hold different sequences."""
        return self.data * self.fsdp


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
    used = [axis for entry in axes if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
    if len(used) != len(set(used)):
        raise RequestError(f"dims {tuple(dims)} put two dims on one mesh axis: {axes}")
    return PartitionSpec(*axes)


@runtime_checkable
class Shard(Protocol):
    """How a model asks for its tensors to be placed. Model code knows only this."""

    @property
    def batch_shards(self) -> int:
        """Groups of devices that hold different sequences."""
        ...

    def activation(self, x: Array, *dims: str) -> Array:
        """x, placed as the table of activations says."""
        ...

    def weights(self, params: Mapping[str, Array], table: Mapping[str, Param]) -> Mapping[str, Array]:
        """Stored parameters, made ready for use."""
        ...

    def local(
        self, function: Callable[..., Array], dims: Sequence[tuple[str, ...]], out_dims: tuple[str, ...]
    ) -> Callable[..., Array]:
        """`function` run by every device on its own part of the arguments, whose dims are given one by one:
        for kernels that the compiler cannot split by itself."""
        ...


@dataclass(frozen=True)
class Unsharded:
    """One device, or whatever the compiler makes of it."""

    @property
    def batch_shards(self) -> int:
        return 1

    def activation(self, x: Array, *dims: str) -> Array:
        assert x.ndim == len(dims), (x.shape, dims)
        return x

    def weights(self, params: Mapping[str, Array], table: Mapping[str, Param]) -> Mapping[str, Array]:
        return params

    def local(
        self, function: Callable[..., Array], dims: Sequence[tuple[str, ...]], out_dims: tuple[str, ...]
    ) -> Callable[..., Array]:
        return function


UNSHARDED = Unsharded()


@dataclass(frozen=True)
class OnMesh:
    """Placement on a mesh by the two tables."""

    mesh: Mesh

    @property
    def batch_shards(self) -> int:
        axes = ACTIVATION_RULES["batch"] or ()
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def activation(self, x: Array, *dims: str) -> Array:
        assert x.ndim == len(dims), (x.shape, dims)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec(dims, ACTIVATION_RULES)))

    def weights(self, params: Mapping[str, Array], table: Mapping[str, Param]) -> Mapping[str, Array]:
        return {name: _gather(w, self.mesh, table[name].dims) for name, w in params.items()}

    def local(
        self, function: Callable[..., Array], dims: Sequence[tuple[str, ...]], out_dims: tuple[str, ...]
    ) -> Callable[..., Array]:
        specs: Any = tuple(spec(d, ACTIVATION_RULES) for d in dims)
        # check_vma: a kernel's results do not say along which axes they vary.
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=specs, out_specs=spec(out_dims, ACTIVATION_RULES), check_vma=False
        )


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(w: Array, mesh: Mesh, dims: tuple[str, ...]) -> Array:
    """A stored parameter made ready for use; its gradient goes straight back to where it is stored.

    A plain constraint would ask for the gradient gathered as well: an all-reduce where a
    reduce-scatter does (ZeRO, Rajbhandari et al. 2020, sec. 5).
    """
    return jax.lax.with_sharding_constraint(w, NamedSharding(mesh, spec(dims, ACTIVATION_RULES)))


def _gather_forward(w: Array, mesh: Mesh, dims: tuple[str, ...]) -> tuple[Array, None]:
    return _gather(w, mesh, dims), None


def _gather_backward(mesh: Mesh, dims: tuple[str, ...], _: None, grad: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(grad, NamedSharding(mesh, spec(dims, PARAMETER_RULES))),)


_gather.defvjp(_gather_forward, _gather_backward)


def param_shardings(tree: ParamTree, mesh: Mesh) -> dict:
    """A NamedSharding for every parameter, in the shape of the table."""
    return map_params(lambda p: NamedSharding(mesh, spec(p.dims, PARAMETER_RULES)), tree)


def check_divides(tree: ParamTree, layout: Layout) -> None:
    """RequestError for the first parameter dim that an axis does not divide: tensor, dim, both numbers, nearest."""
    sizes = dataclasses.asdict(layout)
    for path, param in leaves(tree):
        for dim, size in zip(param.dims, param.shape, strict=True):
            for rules in (PARAMETER_RULES, ACTIVATION_RULES):
                axis = rules.get(dim)
                if isinstance(axis, str) and size % sizes[axis]:
                    fits = [n for n in range(1, size + 1) if size % n == 0]
                    near = min(fits, key=lambda n: abs(n - sizes[axis]))
                    raise RequestError(
                        f"{path}: dim {dim!r} is {size}, which {axis}={sizes[axis]} does not divide; "
                        f"nearest: {axis}={near}"
                    )
