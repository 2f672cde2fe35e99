"""What travels in a compiled step: each collective with its axis, bytes, how often, who caused it, and whether the
layout explains it."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.diagnosis.placed import Placed
from experiments.diagnosis.source import Origin, Sources
from experiments.forecast.groups import axis_of_collective, replica_group
from experiments.forecast.hlo import Module
from experiments.forecast.instructions import Computation, Instruction
from transformer.sharding import Layout

EXPLAINED: dict[str, dict[str, str]] = {
    "slice": {"all-reduce": "gradients of replicas"},
    "data": {"all-reduce": "gradients of replicas"},
    "fsdp": {
        "all-gather": "weights, for use", "reduce-scatter": "gradients, to where they are stored",
        "all-reduce": "gradients of what is not split",
    },
    "expert": {
        "all-to-all": "tokens, to their experts and back", "all-gather": "weights, for use",
        "reduce-scatter": "gradients, to where they are stored", "all-reduce": "gradients of what is not split",
    },
    "context": {
        "all-gather": "keys and values, or weights for use", "reduce-scatter": "gradients of what was gathered",
        "all-reduce": "gradients of what is not split", "collective-permute": "keys and values, around the ring",
    },
    "tensor": {
        "all-gather": "positions, as a layer's maps read them", "reduce-scatter": "a layer's sums, to their positions",
        "all-reduce": "sums of a layer or of the vocabulary",
    },
    "pipeline": {
        "collective-permute": "a microbatch, to the next stage", "all-reduce": "sums over the vocabulary",
        "all-gather": "rows of the vocabulary", "reduce-scatter": "sums over the vocabulary",
    },
}  # fmt: skip
"""What the rules of a layout send along an axis, by kind. All else is the compiler's own doing."""

ASKED = frozenset({
    "all_gather", "all_gather_invariant", "psum", "psum_invariant", "psum2", "pmax", "reduce_scatter", "psum_scatter",
    "all_to_all", "ppermute",
})  # fmt: skip
"""JAX's collectives: whoever wrote one in a `shard_map` asked for it."""

SMALL, LARGE = 0.001, 0.01
"""Shares of a step's bytes: below the first a collective is not worth a word; from the second on its tensor must be
one that a rule places. Between lie pieces of tensors, by which the compiler works."""


@dataclass(frozen=True)
class Collective:
    """One instruction. Bytes are of one device's whole array: gathered, or before it is scattered."""

    axis: str
    kind: str
    n_bytes: int
    times: int  # a step
    tensor: str  # the largest array
    origin: Origin
    surprise: str | None = None  # why the layout does not explain it
    hint: str = ""

    @property
    def step_bytes(self) -> int:
        return self.n_bytes * self.times

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"step_bytes": self.step_bytes}


def collectives(text: str, module: Module, layout: Layout, known: Sequence[Placed]) -> list[Collective]:
    """Those of a compiled step, most bytes first. `known` are the tensors that rules place."""
    sources = Sources(text)
    sent = list(_sent(module, module.computations[module.entry], 1))
    total = sum(_moved(s, module, layout)[0] * s.times for s in sent) or 1
    found: dict[tuple, Collective] = {}
    for one in sent:
        n_bytes, elements, tensor = _moved(one, module, layout)
        axis = axis_of_collective(one.collective.attributes, layout)
        if axis == "self":
            continue
        kind = _kind(one)
        origin = _origin(one, sources)
        asked = one.collective.op_name.rpartition("/")[2] in ASKED
        share = n_bytes * one.times / total
        surprise = None
        if not asked and share >= SMALL:
            surprise = _surprise(kind, axis, elements, known, layout, large=share >= LARGE)
        made = Collective(axis, kind, n_bytes, one.times, tensor, origin, surprise, _hint(kind, axis, surprise))
        key = (axis, kind, n_bytes, tensor, origin, surprise)
        found[key] = dataclasses.replace(made, times=made.times + (found[key].times if key in found else 0))
    return sorted(found.values(), key=lambda c: -c.step_bytes)


@dataclass(frozen=True)
class _Sent:
    """A collective where it runs: itself, or inside the instruction that the schedule has."""

    collective: Instruction
    inside: Computation
    scheduled: Instruction
    around: Computation
    times: int


def _sent(module: Module, computation: Computation, times: int) -> Iterator[_Sent]:
    """Every execution, loops multiplied out; of a conditional's branches all."""
    started: set[str | None] = set()
    for instruction in computation.instructions:
        if instruction.opcode == "while":
            body = module.computations[instruction.attribute(r"body=%?([\w.\-]+)") or ""]
            yield from _sent(module, body, times * (module.trip_count(instruction) or 1))
        elif instruction.collective:
            yield _Sent(instruction, computation, instruction, computation, times)
        elif instruction.opcode in ("call", "conditional", "async-start"):
            for name in instruction.called:
                yield from _sent(module, module.computations[name], times)
        elif instruction.opcode in ("fusion", "fusion-start"):
            yield from _fused(module, computation, instruction, times, started)


def _fused(
    module: Module, around: Computation, fusion: Instruction, times: int, started: set[str | None]
) -> Iterator[_Sent]:
    """The TPU compiler's fusions around a collective: of those that start it, go along and end it, the first."""
    for name in fusion.called:
        inside = module.computations[name]
        for inner in inside.instructions:
            if not inner.collective:
                continue
            channel = inner.attribute(r"channel_id=(\d+)")
            roles = " ".join(i.attributes for i in inside.instructions if i.opcode == "custom-call")
            if "AsyncCollectiveStart" in roles:
                started.add(channel)
            elif channel in started:
                continue
            yield _Sent(inner, inside, fusion, around, times)


def _kind(one: _Sent) -> str:
    kind = one.collective.collective or ""
    if kind == "all-reduce" and one.scheduled.opcode == "fusion":
        scatters = any(i.opcode == "dynamic-slice" for i in one.inside.instructions)
        return "reduce-scatter" if scatters else kind  # as the TPU compiler writes it
    return kind


def _moved(one: _Sent, module: Module, layout: Layout) -> tuple[int, tuple[int, ...], str]:
    """Bytes of whole arrays, the elements of each as the devices have it afterwards, and the largest in words."""
    shapes = one.inside.operand_shapes(one.collective)
    n = len(replica_group(one.collective.attributes, layout.n_devices)) or 1
    kind = _kind(one)
    grown = n if kind == "all-gather" else 1
    left = n if kind == "reduce-scatter" else 1
    largest = max(shapes, key=lambda s: s.n_bytes, default=None)
    words = f"{largest.dtype}[{','.join(map(str, largest.dims))}]" if largest else "?"
    arrays = [n for name in one.collective.operands for n in _joined(module, one.inside, name)]
    after = tuple(n * grown // left for n in arrays)
    if kind == "all-to-all":
        after = (sum(after),)
    return sum(s.n_bytes for s in shapes) * grown, after, words


def _joined(module: Module, computation: Computation, name: str) -> Iterator[int]:
    """Elements of the arrays that an operand is: the GPU compiler puts several end to end, to sum them at once."""
    made = computation.by_name[name]
    if made.opcode == "fusion" and made.called:
        computation = module.computations[made.called[0]]
        made = computation.root
    whole = made.opcode == "concatenate" and len(made.shapes[0].dims) == 1
    yield from (s.elements for s in (computation.operand_shapes(made) if whole else made.shapes))


def _origin(one: _Sent, sources: Sources) -> Origin:
    """Its own, or where the compiler left none, that of its nearest neighbour with one."""
    for instruction, computation in ((one.scheduled, one.around), (one.collective, one.inside)):
        frontier, seen = [instruction], {instruction.name}
        for _ in range(6):
            for near in frontier:
                if (origin := sources.origin(near.attributes)).known:
                    return origin
            names = [n for near in frontier for n in (*near.operands, *(u.name for u in computation.users[near.name]))]
            frontier = [computation.by_name[n] for n in names if n in computation.by_name and n not in seen]
            seen.update(names)
    return Origin()


def _surprise(
    kind: str, axis: str, elements: Sequence[int], known: Sequence[Placed], layout: Layout, *, large: bool
) -> str | None:
    """Why no rule of the layout explains a collective, or None.

    Two things are asked: whether the table has such a kind along each of its axes, where sums of replicas may go along
    with others'; and whether each array is one that a rule places with these axes as the kind leaves them: gathered or
    summed over them, or split. A gather or scatter may also go around a ring, one device's part at a time, beside the
    product that it belongs to (Wang et al. 2023, collective matmul)."""
    axes = axis.split("_")
    unknown = [a for a in axes if kind not in EXPLAINED[a]]
    if kind == "collective-permute" and "context" in axes and not layout.ring:
        unknown.append("context")
    if kind == "reduce-scatter" and not set(axes) <= {"slice", "data"}:
        unknown = [a for a in unknown if a not in ("slice", "data")]
    strange = sum(n for n in elements if not any(_explains(p, n, kind, axes) for p in known))
    if kind == "collective-permute" and not strange and all("reduce-scatter" in EXPLAINED[a] for a in axes):
        return None
    if unknown:
        return f"no rule sends {kind}s along {', '.join(unknown)}"
    if large and strange > 0.5 * sum(elements):
        how = "split" if kind == "reduce-scatter" else "whole"
        return f"no rule places a tensor of this size {how} along {', '.join(axes)}"
    return None


def _explains(placed: Placed, elements: int, kind: str, axes: Sequence[str]) -> bool:
    sizes = {math.prod(placed.local_shape)}
    if "layers" in placed.dims:  # a stack is worked off layer by layer
        sizes.add(math.prod(placed.local_shape) // placed.local_shape[placed.named_dims.index("layers")])
    if kind == "all-reduce" and elements in {n * placed.layout.split(tuple(axes)) for n in sizes}:
        return set(axes) <= set(placed.used)  # a scatter, as CPUs write it and TPUs can
    if elements not in sizes:
        return False
    if kind in ("reduce-scatter", "collective-permute"):
        return not set(axes).isdisjoint(placed.used)
    return kind not in ("all-gather", "all-reduce") or set(axes).isdisjoint(placed.used)


def _hint(kind: str, axis: str, surprise: str | None) -> str:
    if surprise is None:
        known = [EXPLAINED[a][kind] for a in axis.split("_") if kind in EXPLAINED[a]]
        if kind == "collective-permute" and not known:
            return "a gather or scatter, part by part beside its product"
        return "; ".join(dict.fromkeys(known)) or "asked for in the code"
    return _HINTS.get(kind, "the compiler's own choice: place the tensors around this line (`shard.activation`)")


_HINTS = {
    "all-to-all": "two dims change places on one axis: give what is made and what reads it the same dims",
    "collective-permute": "a slice, roll or reshape crosses the borders of what is split: split another dim there",
    "all-gather": "what should stay split is gathered: place it at this line (`shard.activation` with its dims), or "
    "look for a constraint that lacks an axis",
    "all-reduce": "a sum over a split dim that no rule asks for: place an operand before it (`shard.activation`)",
    "reduce-scatter": "a sum over a split dim that no rule asks for: place an operand before it (`shard.activation`)",
}
"""What to look at where a collective is surprising."""
