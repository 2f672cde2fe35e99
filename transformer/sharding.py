"""Where tensors live. Dims are named in the model, axes in the mesh; two tables here join them.

*Axis* is said of the mesh, *dim* of a tensor. Parameters are stored by one table and computed with
by another: what `fsdp` splits in storage is gathered for use, and its gradient is scattered back.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from transformer.errors import RequestError, nearest
from transformer.params import Param, ParamTree, map_params

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

REPLICAS = ("slice", "data", "fsdp")
"""Axes of devices that hold other sequences and, once gathered, the same parameters."""

Rules = Mapping[str, str | tuple[str, ...] | None]

DIMS = (
    "batch", "expert_batch", "length", "sequence", "layers", "embed", "expert_embed", "latent", "kv_heads", "kv_head",
    "group", "heads", "head", "ffn", "experts", "vocab", "position", "channel",
)  # fmt: skip
"""Names of dims. embed: the residual stream; expert_embed: the same as a side of an expert's matrix; latent: what
latent attention's queries, keys and values pass through, as the inner side of the maps out of it; kv_heads, group:
heads of keys and values, and the queries of each; kv_head, heads: the only one, and all queries; length: positions
within a layer, sequence: positions between layers; batch: sequences, expert_batch: sequences where experts meet them;
channel: any other that no axis splits."""

PARAMETER_RULES: Rules = {
    "embed": ("fsdp", "expert", "context"), "expert_embed": ("fsdp", "context"),
    "latent": ("fsdp", "expert", "context"), "experts": "expert", "layers": "pipeline",
    "kv_heads": "tensor", "heads": "tensor", "ffn": "tensor", "vocab": ("pipeline", "tensor"),
}  # fmt: skip
"""Storage: every matrix is split along the residual stream over the axes whose devices hold other tokens, but for
replicas, and over tensor along its other side."""

MATRIX_DIMS = ("embed", "expert_embed", "latent")
"""What every matrix has as one of its sides, and no vector: so weight decay knows which is which."""

ACTIVATION_RULES: Rules = {
    "batch": ("slice", "data", "fsdp", "expert"), "expert_batch": ("slice", "data", "fsdp"), "length": "context",
    "sequence": ("context", "tensor"), "experts": "expert", "layers": "pipeline", "kv_heads": "tensor",
    "heads": "tensor", "ffn": "tensor", "vocab": ("pipeline", "tensor"),
}  # fmt: skip
"""Compute: sequences over replicas, fsdp and expert; their positions over context, and between layers over tensor
too (Korthikanti et al. 2022, sec. 4.2.2); heads and hidden units over tensor; weights lose their fsdp split."""


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes of one dim's rule."""
    return (entry,) if isinstance(entry, str) else entry or ()


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


def make_mesh(layout: Layout, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The one place where a mesh is made: axes in the order of AXES, Auto, over the first n devices. TPUs of several
    slices are placed slice by slice, for `jax.make_mesh` knows one."""
    devices = jax.devices() if devices is None else devices
    if layout.n_devices > len(devices):
        raise RequestError(f"layout {layout} needs {layout.n_devices} devices, {len(devices)} are attached")
    devices, auto = devices[: layout.n_devices], (AxisType.Auto,) * len(AXES)
    of_slices = Counter(getattr(device, "slice_index", 0) for device in devices)
    n_slices = len(of_slices)
    if layout.slice > 1 and n_slices == layout.slice and len(set(of_slices.values())) == 1:
        between = [layout.slice if axis == "slice" else 1 for axis in AXES]
        within = [1 if axis == "slice" else size for axis, size in layout.shape.items()]
        return Mesh(mesh_utils.create_hybrid_device_mesh(within, between, devices), AXES, axis_types=auto)
    if n_slices > 1 and devices[0].platform == "tpu":  # slices of GPUs are hosts, which any axis may cross
        raise RequestError(f"layout {layout}: the devices are of {n_slices} slices; nearest: slice={n_slices}")
    return jax.make_mesh(layout.sizes, AXES, devices=devices, axis_types=auto)


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
    along = {dim: (*axes_of(rules.get(dim)), "pipeline") for dim in MATRIX_DIMS if dim in sizes}
    fits = {dim: axes for dim, axes in along.items() if sizes[dim] % math.prod(shape[axis] for axis in axes) == 0}
    return spec(param.dims, {**rules, **fits, "layers": None})


Dims = tuple[str, ...]


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


def param_shardings(tree: ParamTree, mesh: Mesh) -> dict:
    """A NamedSharding for every parameter, in the shape of the table."""
    return map_params(lambda p: NamedSharding(mesh, param_spec(p, mesh.shape)), tree)


def keys_by_round(parts: np.ndarray, device: int, *, ring: bool) -> list[np.ndarray]:
    """Whose keys a device meets in each round, of all devices' parts [C, n]: those of all at once, or around a ring in
    round r those of the r-th device before it."""
    return [parts[(device - r) % len(parts)] for r in range(len(parts))] if ring else [parts.reshape(-1)]
