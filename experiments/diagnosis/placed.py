"""What a layout places where, before anything compiles: parameters from the model's table, activations from the traced
program, and what the rules did for them."""

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from experiments.diagnosis.source import Origin, Sources
from experiments.forecast.instructions import BITS
from experiments.step import TrainStep
from transformer.params import leaves
from transformer.sharding import ACTIVATION_RULES, AXES, PARAMETER_RULES, Layout, Rules, axes_of, spec

_SHARDING = re.compile(r"sharding_per_value<\[<@\w+, \[(.*?)\]>\]>")
_TOKENS = frozenset({"batch", "expert_batch", "length", "sequence"})
"""Dims of activations, and of no weight."""


@dataclass(frozen=True)
class Placed:
    """A tensor and the mesh axes of each of its dims."""

    name: str  # the parameter's path, or the module's
    dims: tuple[str, ...]  # none where no rule placed it
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[tuple[str, ...], ...]
    layout: Layout
    origin: Origin = field(default_factory=Origin)
    state_bytes: int = 0  # on one device, of a parameter with what the optimizer keeps of it

    @property
    def used(self) -> tuple[str, ...]:
        """Axes above 1 that split it."""
        return tuple(a for axes in self.axes for a in axes if getattr(self.layout, a) > 1)

    @property
    def replicated(self) -> tuple[str, ...]:
        """Axes above 1 whose devices hold the same."""
        return tuple(a for a in AXES if getattr(self.layout, a) > 1 and a not in self.used)

    @property
    def local_shape(self) -> tuple[int, ...]:
        return tuple(-(-n // self.layout.split(axes)) for n, axes in zip(self.shape, self.axes, strict=True))

    @property
    def n_bytes(self) -> int:
        """On one device."""
        return math.prod(self.local_shape) * BITS[self.dtype] // 8

    @property
    def is_activation(self) -> bool:
        return not self.dims or not _TOKENS.isdisjoint(self.dims)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "dims": self.named_dims, "dtype": self.dtype, "shape": self.shape, "axes": self.axes,
            "local_shape": self.local_shape, "bytes_per_device": self.n_bytes, "replicated_over": self.replicated,
            **({"state_bytes_per_device": self.state_bytes} if self.state_bytes else {"where": self.origin.where}),
        }  # fmt: skip

    @property
    def named_dims(self) -> tuple[str, ...]:
        """A name for every dim: those in front that a map over stages or groups has added are "mapped"."""
        return ("mapped",) * (len(self.shape) - len(self.dims)) + self.dims if self.dims else ()


def parameters(step: TrainStep, layout: Layout) -> list[Placed]:
    """Every parameter as it is stored, largest first."""
    state = _state_bytes(step)
    found = [
        Placed(
            path, p.dims, "f32", p.shape, tuple(axes_of(entry) for entry in spec(p.dims, PARAMETER_RULES)), layout,
            state_bytes=state[path],
        )
        for path, p in leaves(step.table)
    ]  # fmt: skip
    return sorted(found, key=lambda p: -p.n_bytes)


def _state_bytes(step: TrainStep) -> Counter[str]:
    """Bytes on one device of each parameter and of every array of the optimizer that has its path."""
    names = [path for path, _ in leaves(step.table)]
    found: Counter[str] = Counter()
    for path, array in jax.tree_util.tree_flatten_with_path(step.abstract_state)[0]:
        keys = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        name = "/".join(keys)
        if name in names:
            found[name] += math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
    return found


def constraints(text: str, layout: Layout) -> list[Placed]:
    """Every tensor that the program asks to be placed, once for each module, largest first: from the text of the
    lowered program, in HLO with its debug information."""
    sources, found = Sources(text), {}
    for line in text.splitlines():
        if 'custom_call_target="Sharding"' not in line or (axes := _SHARDING.search(line)) is None:
            continue
        made = re.search(r"= (\w+)\[([\d,]*)\]", line)
        if made is None:
            continue
        origin = sources.origin(line.partition("metadata=")[2])
        placed = Placed(
            origin.module, origin.dims, made[1], tuple(int(n) for n in made[2].split(",") if n),
            tuple(tuple(re.findall(r"\w+", dim)) for dim in re.findall(r"\{(.*?)\}", axes[1])), layout, origin,
        )  # fmt: skip
        if placed.dims and len(placed.dims) > len(placed.shape):
            placed = dataclasses.replace(placed, dims=())
        key = (placed.name, placed.named_dims, placed.dtype, placed.shape, placed.axes)
        if key not in found or origin.phase == "forward":
            found[key] = placed
    return sorted(found.values(), key=lambda p: -p.n_bytes)


@dataclass(frozen=True)
class Rule:
    """A line of a rule table, and what it did."""

    table: str
    dim: str
    axes: tuple[str, ...]
    n_tensors: int
    parts: int

    @property
    def outcome(self) -> str:
        if not self.n_tensors:
            return "no tensor has this dim"
        if self.parts == 1:
            return "not split: one device along " + ("it" if len(self.axes) == 1 else "them")
        return f"split in {self.parts}"


def rules(placed: Sequence[Placed], constrained: Sequence[Placed], layout: Layout) -> list[Rule]:
    """Both tables. What does not divide has been refused before."""
    return [
        *_rules("parameters", PARAMETER_RULES, placed, layout),
        *_rules("activations", ACTIVATION_RULES, constrained, layout),
    ]


def _rules(table: str, given: Rules, tensors: Sequence[Placed], layout: Layout) -> Iterator[Rule]:
    for dim, entry in given.items():
        n = sum(dim in t.dims for t in tensors)
        yield Rule(table, dim, axes_of(entry), n, layout.split(entry))


@dataclass(frozen=True)
class Replicated:
    """Tensors of which devices along some axes hold copies."""

    axes: tuple[str, ...]
    names: tuple[str, ...]  # largest first
    n_bytes: int  # on one device
    copies: int

    @property
    def cost_bytes(self) -> int:
        """What a device would save were they split over these axes too."""
        return round(self.n_bytes * (1 - 1 / self.copies))


def replicated(tensors: Iterable[Placed]) -> list[Replicated]:
    """By the axes, dearest first: of parameters with what the optimizer keeps of them."""
    groups: dict[tuple[str, ...], list[Placed]] = defaultdict(list)
    for tensor in tensors:
        if tensor.replicated:
            groups[tensor.replicated].append(tensor)
    found = [
        Replicated(
            axes, tuple(t.name for t in group), sum(t.state_bytes or t.n_bytes for t in group),
            math.prod(getattr(group[0].layout, axis) for axis in axes),
        )
        for axes, group in groups.items()
    ]  # fmt: skip
    return sorted(found, key=lambda r: -r.cost_bytes)
