"""The compiled schedule played on a device: compute and communication as two streams through the loops.

Instructions run in the order in which the compiler scheduled them. A synchronous one holds the compute
stream; an asynchronous collective runs on the communication stream from where it starts, one at a
time, and the compute stream waits at its `done` for what is left of it: that wait is *exposed*, the
rest is *hidden*. So the parts of a step add up to the step by construction.
"""

from collections import defaultdict
from dataclasses import dataclass, field

from experiments.forecast.groups import axis_of, axis_of_collective, replica_group
from experiments.forecast.hlo import FREE, Computation, Instruction, Module
from experiments.forecast.network import Fabric
from experiments.forecast.rates import Rates
from transformer.sharding import Layout

_NO_WORK = frozenset({
    "AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "PrepareAsyncCallStart", "PrepareAsyncCallDone",
})  # fmt: skip
"""Custom calls by which the TPU compiler names memory or promises something: nothing runs."""

STEADY_AFTER = 3  # iterations played before a loop's rest is taken to repeat the last of them

Sums = defaultdict[str, float]

_Pending = tuple[float, float]
"""What was started: when it ends, and the seconds of a copy (0 for a collective: the wire knows it)."""


def _zeros() -> Sums:
    return defaultdict(float)


_SUMS = ("breakdown_s", "hidden_s", "flops", "unknown_bytes", "collective_bytes")


@dataclass
class Timeline:
    """Both streams and what they were used for, in seconds."""

    compute_s: float = 0.0  # where the compute stream stands
    network_s: float = 0.0  # where the communication stream stands
    host_s: float = 0.0  # where copies to and from the host stand
    breakdown_s: Sums = field(default_factory=_zeros)
    hidden_s: Sums = field(default_factory=_zeros)
    flops: Sums = field(default_factory=_zeros)
    unknown_bytes: Sums = field(default_factory=_zeros)  # custom calls that are costed by their bytes alone
    collective_bytes: Sums = field(default_factory=_zeros)  # of one device's whole arrays, by "axis kind"
    wire: list[tuple[float, float, str]] = field(default_factory=list)  # begin, end, axis of what is not yet past

    def run(self, category: str, seconds: float) -> None:
        self.compute_s += seconds
        self.breakdown_s[category] += seconds

    def send(self, seconds: float, axis: str) -> float:
        """Put a collective on the wire, behind those that are there; when it ends. Hidden until waited for."""
        begin = max(self.network_s, self.compute_s)
        self.network_s = begin + seconds
        self.wire.append((begin, self.network_s, axis))
        self.hidden_s[axis] += seconds
        return self.network_s

    def wait(self, end: float) -> None:
        """Let the compute stream stand until `end`: what the wire carries meanwhile is exposed."""
        now = self.compute_s
        for begin, until, axis in self.wire:
            seconds = min(until, end) - max(begin, now)
            if seconds > 0:
                self.run(f"exposed_{axis}", seconds)
                self.hidden_s[axis] -= seconds
        self.wire = [sent for sent in self.wire if sent[1] > end]

    def repeat(self, times: int, before: "Timeline") -> None:
        """Add what was added since `before` another `times` times."""
        for name in _SUMS:
            now, then = getattr(self, name), getattr(before, name)
            for key in now:
                now[key] += times * (now[key] - then.get(key, 0.0))
        shift = times * (self.compute_s - before.compute_s)
        self.compute_s += shift
        self.network_s += shift
        self.host_s += shift
        self.wire = [(begin + shift, end + shift, axis) for begin, end, axis in self.wire]

    def copy(self) -> "Timeline":
        sums = {name: defaultdict(float, getattr(self, name)) for name in _SUMS}
        return Timeline(self.compute_s, self.network_s, self.host_s, **sums, wire=list(self.wire))


@dataclass(frozen=True)
class Simulator:
    """A module on a device. `layout` names the axis that a collective's group lies along."""

    module: Module
    rates: Rates
    fabric: Fabric
    layout: Layout

    def run(self) -> Timeline:
        """Play one step."""
        timeline = Timeline()
        self._play(self.module.computations[self.module.entry], timeline)
        return timeline

    def _play(self, computation: Computation, timeline: Timeline) -> None:
        pending: dict[str, _Pending] = {}
        for instruction in computation.instructions:
            opcode = instruction.opcode
            if opcode in FREE:
                continue
            if opcode == "while":
                self._loop(instruction, timeline)
            elif opcode in ("call", "conditional"):
                self._longest(instruction, timeline)
            elif opcode == "fusion" and self._collective_of(computation, instruction)[0]:
                self._fused_collective(computation, instruction, pending, timeline)
            elif opcode.endswith("-done"):
                self._wait(instruction, pending, timeline)
            elif opcode.endswith("-start") or opcode == "send":
                pending[instruction.name] = self._begin(computation, instruction, timeline)
            elif instruction.collective:
                self._settle(*self._begin(computation, instruction, timeline), timeline)
            else:
                self._compute(computation, instruction, timeline)

    def _loop(self, loop: Instruction, timeline: Timeline) -> None:
        name = loop.attribute(r"body=%?([\w.\-]+)")
        assert name is not None, loop.name
        body, trips = self.module.computations[name], self.module.trip_count(loop)
        before = timeline.copy()
        for _ in range(min(trips, STEADY_AFTER)):
            before = timeline.copy()
            self._play(body, timeline)
        timeline.repeat(trips - min(trips, STEADY_AFTER), before)

    def _longest(self, call: Instruction, timeline: Timeline) -> None:
        """A call, or the branch of a conditional that takes longest."""
        outcomes = []
        for name in call.called:
            outcome = timeline.copy()
            self._play(self.module.computations[name], outcome)
            outcomes.append(outcome)
        if outcomes:
            longest = max(outcomes, key=lambda t: t.compute_s)
            timeline.__dict__.update(longest.__dict__)

    def _begin(self, computation: Computation, start: Instruction, timeline: Timeline) -> _Pending:
        collective, inside = self._collective_of(computation, start)
        if collective is None:  # a copy, or a fusion that a second stream works off: by its bytes
            if start.opcode in ("copy-start", "slice-start"):  # source and result: what is not sliced is not moved
                n_bytes = float(min((s.n_bytes for s in start.shapes if s.dims), default=0))
            else:
                n_bytes = self.module.traffic_bytes(computation, start)
            if self.module.to_host(computation, start):  # one after another over the same link
                timeline.host_s = max(timeline.host_s, timeline.compute_s) + self.rates.host_s(n_bytes)
                return timeline.host_s, self.rates.host_s(n_bytes)
            seconds = self.rates.memory_s(n_bytes)
            return timeline.compute_s + seconds, seconds
        group = replica_group(collective.attributes, self.layout.n_devices)
        n_bytes = float(sum(s.n_bytes for s in inside.operand_shapes(collective)))
        kind = collective.collective or ""
        if kind == "all-gather":
            n_bytes *= len(group)
        if (
            kind == "all-reduce"
            and start.opcode == "fusion"
            and any(i.opcode == "dynamic-slice" for i in inside.instructions)
        ):
            kind = "reduce-scatter"  # as the TPU compiler writes it
        seconds = self.fabric.collective_s(kind, n_bytes, group)
        axis = axis_of_collective(collective.attributes, self.layout)
        timeline.collective_bytes[f"{axis} {kind}"] += n_bytes
        return timeline.send(seconds, axis), 0.0

    def _collective_of(self, computation: Computation, start: Instruction) -> tuple[Instruction | None, Computation]:
        """The collective that a start stands for, and where its operands are: itself, or inside what it calls."""
        if start.collective:
            return start, computation
        for name in start.called:
            for inner in self.module.computations[name].instructions:
                if inner.collective:
                    return inner, self.module.computations[name]
        return None, computation

    def _fused_collective(
        self,
        computation: Computation,
        fusion: Instruction,
        pending: dict[str, _Pending],
        timeline: Timeline,
    ) -> None:
        """The TPU compiler's fusions around a collective: one starts it, some compute while it travels, one
        waits for it; all of them bear its channel. One alone is a whole collective, its operands fused in."""
        collective, inside = self._collective_of(computation, fusion)
        assert collective is not None
        channel = "channel " + (collective.attribute(r"channel_id=(\d+)") or fusion.name)
        roles = {i.attribute(r'custom_call_target="([^"]*)"') for i in inside.instructions if i.opcode == "custom-call"}
        if "AsyncCollectiveStart" in roles:
            pending[channel] = self._begin(computation, fusion, timeline)
        elif channel in pending and "AsyncCollectiveDone" in roles:
            self._settle(*pending.pop(channel), timeline)
        else:
            if channel not in pending:
                self._settle(*self._begin(computation, fusion, timeline), timeline)
            if self.module.flops(computation, fusion):
                self._compute(computation, fusion, timeline)

    def _wait(self, done: Instruction, pending: dict[str, _Pending], timeline: Timeline) -> None:
        for name in done.operands:
            if name in pending:
                self._settle(*pending.pop(name), timeline)

    def _settle(self, end: float, copy_s: float, timeline: Timeline) -> None:
        if not copy_s:
            timeline.wait(end)
            return
        wait_s = max(0.0, end - timeline.compute_s)
        timeline.run("exposed_copy", wait_s)
        timeline.hidden_s["copy"] += copy_s - wait_s

    def axis_of(self, group: list[int]) -> str:
        """The mesh axes along which a group's devices differ, such as "tensor" or "data_fsdp"."""
        return axis_of(group, self.layout)

    def _compute(self, computation: Computation, instruction: Instruction, timeline: Timeline) -> None:
        """The roofline: whichever of arithmetic and memory takes longer, and never less than a launch."""
        target = instruction.attribute(r'custom_call_target="([^"]*)"') or "custom-call"
        if instruction.opcode == "custom-call" and target in _NO_WORK:
            return
        rates, module = self.rates, self.module
        n_bytes = module.traffic_bytes(computation, instruction)
        flops = module.flops(computation, instruction)
        if module.to_host(computation, instruction):
            timeline.run("exposed_copy", max(rates.host_s(n_bytes), rates.launch_s))
            return
        category, arithmetic_s = "memory", 0.0
        if flops and instruction.opcode == "custom-call":
            category = "attention"
            arithmetic_s = rates.attention_s(flops, module.dot_dtype(computation, instruction))
        elif flops:
            category = "matmul"
            arithmetic_s = sum(rates.product_s(product) for product in module.products(computation, instruction))
        elif instruction.opcode == "custom-call":
            timeline.unknown_bytes[target] += n_bytes
        if flops:
            timeline.flops[category] += flops
        timeline.run(category, max(arithmetic_s, rates.memory_s(n_bytes), rates.launch_s))
