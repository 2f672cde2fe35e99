"""The compiled schedule played on a device: compute and communication as streams through the loops.

Instructions run in the order in which the compiler scheduled them. A synchronous one holds the compute stream; an
asynchronous one travels on a stream of its kind from where it starts, one at a time, and the compute stream waits at
its `done` for what is left of it: that wait is *exposed*, the rest is *hidden*. So the parts of a step add up to the
step by construction.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from experiments.forecast import operations
from experiments.forecast.groups import axis_of_collective, replica_group
from experiments.forecast.hlo import Module
from experiments.forecast.instructions import FREE, Computation, Instruction
from experiments.forecast.network import Fabric
from experiments.forecast.rates import Rates
from experiments.forecast.timeline import Timeline, Transfer, Work
from transformer.sharding import Layout

_NO_WORK = frozenset({
    "AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "PrepareAsyncCallStart", "PrepareAsyncCallDone",
})  # fmt: skip
"""Custom calls by which the TPU compiler names memory or promises something: nothing runs."""

_BY_BYTES_ALONE = ("sort", "fft", "cholesky", "triangular-solve", "rng", "rng-bit-generator")
"""Of instructions that are no products: what does more than a few operations a byte."""

_PASSES = {"all-reduce": 2.0}
"""Of a collective's bytes over the wire, a scatter and a gather; each byte sent is read, each received is written."""

STEADY_AFTER = 2, 4
"""Iterations played before a loop's rest is taken to repeat the last: at least, and at most if two never take the same
time."""

PIPELINED = "send", "recv"  # whose pair may lie in another computation, or in the next iteration


@dataclass
class _Course:
    """How a play goes that crosses computations."""

    passed: dict[str, Transfer] = field(default_factory=dict)  # what was sent, by its channel
    shortest: bool = False  # branch of a conditional, instead of the longest


class _Loop(NamedTuple):
    """What a loop of the program's outermost level took, and of that what ran in branches."""

    trips: int
    seconds: float
    breakdown_s: dict[str, float]
    flops: dict[str, float]


@dataclass(frozen=True)
class Simulator:
    """A module on a device. `layout` names the axis that a collective's group lies along; `microbatches` pass through
    its pipeline; `held` is the part of a GPU's multiprocessors that a collective holds (copy engines hold none);
    `fresh_bytes` are the temporaries of the program, which a CPU is given anew in every step."""

    module: Module
    rates: Rates
    fabric: Fabric
    layout: Layout
    microbatches: int = 1
    held: float = 0.0
    fresh_bytes: float = 0.0
    _known: dict[tuple[str, str], Work] = field(default_factory=dict, repr=False)
    _loops: list[_Loop] = field(default_factory=list, repr=False)

    def run(self, *, trace: bool = False) -> Timeline:
        """Play one step; with `trace`, keep what ran when."""
        timeline = Timeline(spans=[] if trace else None)
        self._loops.clear()
        if given_s := self.rates.fresh_s(self.fresh_bytes):
            timeline.run(Work("memory", memory_s=given_s), "temporaries, given anew")
        self._play(self.module.computations[self.module.entry], timeline, _Course())
        self._tell_bubble(timeline)
        waiting_s = timeline.compute_s * (self.fabric.slowest(self.layout.n_devices) - 1)
        timeline.breakdown_s["stragglers"] += waiting_s
        timeline.compute_s += waiting_s
        return timeline

    def _play(self, computation: Computation, timeline: Timeline, course: _Course) -> None:
        pending: dict[str, Transfer] = {}
        for instruction in computation.instructions:
            opcode = instruction.opcode
            if opcode in FREE:
                continue
            if opcode == "while":
                self._loop(computation, instruction, timeline, course)
            elif opcode in ("call", "conditional"):
                self._longest(instruction, timeline, course)
            elif opcode == "fusion" and self._collective_of(computation, instruction)[0]:
                self._fused_collective(computation, instruction, pending, timeline)
            elif opcode.endswith(("-done", "-update")):
                self._follow(instruction, pending, course, timeline)
            elif opcode in PIPELINED:
                course.passed[_channel(instruction)] = self._hand_over(computation, instruction, timeline)
            elif opcode.endswith("-start"):
                pending[instruction.name] = self._begin(computation, instruction, timeline)
            elif instruction.collective:
                timeline.wait(self._begin(computation, instruction, timeline))
            else:
                self._compute(computation, instruction, timeline)

    def _loop(self, computation: Computation, loop: Instruction, timeline: Timeline, course: _Course) -> None:
        name = loop.attribute(r"body=%?([\w.\-]+)")
        assert name is not None, loop.name
        body, trips = self.module.computations[name], self.module.trip_count(loop)
        if trips is None:
            trips = 1
            timeline.unknown[f"{loop.name}: iterations, counted as one"] += 0.0
        outermost, first = computation.name == self.module.entry, timeline.copy()
        with_ends = min(trips, self.microbatches) if outermost and trips == self._steady_ticks else trips
        self._iterate(body, loop.name, with_ends, timeline, course)
        self._iterate(body, f"{loop.name} without ends", trips - with_ends, timeline, _Course(course.passed, True))
        if outermost:
            seconds = timeline.compute_s - first.compute_s
            self._loops.append(_Loop(trips, seconds, *timeline.outside_branches(first)))

    def _iterate(self, body: Computation, name: str, times: int, timeline: Timeline, course: _Course) -> None:
        before, took_s, played = timeline, -1.0, 0
        for n in range(min(times, STEADY_AFTER[1])):
            before, last_s, played = timeline.copy(), took_s, n + 1
            self._play(body, timeline, course)
            took_s = timeline.compute_s - before.compute_s
            timeline.mark(f"{name}, {n + 1} of {times}", before.compute_s)
            if played >= STEADY_AFTER[0] and abs(took_s - last_s) <= 1e-9 * took_s:
                break
        if times > played:
            timeline.repeat(times - played, before, name)

    @property
    def _steady_ticks(self) -> int:
        """Of a pipeline (`transformer/pipeline.py`): those in which every stage works both ways. In so many of them as
        there are microbatches, one leaves the model's end."""
        return self.layout.repeats * (self.microbatches - self.layout.pipeline) + self.layout.pipeline

    def _longest(self, call: Instruction, timeline: Timeline, course: _Course) -> None:
        """A call, or the branch of a conditional that takes longest: devices wait for each other."""
        outcomes = []
        for name in call.called:
            outcome = timeline.copy()
            self._play(self.module.computations[name], outcome, course)
            outcomes.append(outcome)
        if outcomes:
            chosen = (min if course.shortest else max)(outcomes, key=lambda t: t.compute_s)
            if call.opcode == "conditional":
                chosen.tell_branch(timeline)
            timeline.__dict__.update(chosen.__dict__)

    def _begin(self, computation: Computation, start: Instruction, timeline: Timeline) -> Transfer:
        collective, inside = self._collective_of(computation, start)
        named = start.name, start.op_name
        if collective is None and self.module.to_host(computation, start):
            return self._to_host(computation, start, timeline)
        if collective is None and start.opcode in ("copy-start", "slice-start"):
            n_bytes = _copied_bytes(start)
            transfer = Transfer("copy", "copy", self.rates.memory_s(n_bytes), *named, memory=1.0, n_bytes=n_bytes)
            timeline.traffic_bytes["copy"] += n_bytes
            return timeline.send("copy", transfer)
        if collective is None:  # what a second stream works off
            work = self._work(computation, start)
            memory, multiprocessors = (s / (work.alone_s or 1.0) for s in (work.memory_s, work.arithmetic_s))
            timeline.count(work)
            transfer = Transfer("copy", "copy", work.alone_s, *named, memory, multiprocessors, work.n_bytes)
            return timeline.send("copy", transfer)
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
        axis = axis_of_collective(collective.attributes, self.layout)
        timeline.collective_bytes[f"{axis} {kind}"] += n_bytes
        seconds = self.fabric.collective_s(kind, n_bytes, group)
        return self._send(start, kind, axis, n_bytes, len(group), seconds, timeline)

    def _to_host(self, computation: Computation, line: Instruction, timeline: Timeline) -> Transfer:
        """One after another over the same link."""
        is_copy = line.opcode in ("copy-start", "slice-start")
        n_bytes = _copied_bytes(line) if is_copy else self.module.traffic_bytes(computation, line)
        seconds = max(self.rates.host_s(n_bytes), self.rates.launch_s)
        memory = self.rates.memory_s(n_bytes) / seconds
        timeline.traffic_bytes["copy"] += n_bytes
        named = line.name, line.op_name
        return timeline.send("host", Transfer("copy", "copy", seconds, *named, memory=memory, n_bytes=n_bytes))

    def _hand_over(self, computation: Computation, line: Instruction, timeline: Timeline) -> Transfer:
        """A `send` or `recv`: links carry both ways at once, so each has a stream of its own."""
        group = replica_group(line.attributes, self.layout.n_devices)
        n_bytes = float(line.shapes[0].n_bytes)
        axis = axis_of_collective(line.attributes, self.layout)
        seconds = self.fabric.collective_s("collective-permute", n_bytes, group)
        if line.opcode == "send":
            timeline.collective_bytes[f"{axis} send"] += n_bytes
        return self._send(line, line.opcode, axis, n_bytes, len(group), seconds, timeline)

    def _send(
        self, start: Instruction, kind: str, axis: str, n_bytes: float, g: int, seconds: float, timeline: Timeline
    ) -> Transfer:
        """On GPUs XLA runs collectives on one stream and what goes from device to device on another; a TPU's mesh axes
        lie along links of their own."""
        gpu = self.rates.device.platform == "gpu"
        of = "p2p" if kind in ("collective-permute", *PIPELINED) else "collective"
        stream = kind if kind in PIPELINED else of if gpu else axis
        moved = n_bytes * (1.0 if of == "p2p" else _PASSES.get(kind, 1.0) * (g - 1) / g)
        transfer = Transfer(
            of, axis, seconds, start.name, start.op_name, n_bytes=n_bytes,
            memory=min(1.0, self.rates.memory_s(2 * moved) / seconds) if seconds else 0.0,
            multiprocessors=self.held if gpu else 0.0,
        )  # fmt: skip
        return timeline.send(stream, transfer)

    def _collective_of(self, computation: Computation, start: Instruction) -> tuple[Instruction | None, Computation]:
        """The collective that a start stands for, and where its operands are: itself, or inside what it calls."""
        if start.collective:
            return start, computation
        if start.opcode not in ("fusion", "async-start", "fusion-start", "call-start"):
            return None, computation
        for name in start.called:
            for inner in self.module.computations[name].instructions:
                if inner.collective:
                    return inner, self.module.computations[name]
        return None, computation

    def _fused_collective(
        self, computation: Computation, fusion: Instruction, pending: dict[str, Transfer], timeline: Timeline
    ) -> None:
        """The TPU compiler's fusions around a collective: one starts it, some compute while it travels, one
        waits for it; all of them bear its channel. One alone is a whole collective, its operands fused in."""
        collective, inside = self._collective_of(computation, fusion)
        assert collective is not None
        channel = "channel " + (collective.attribute(r"channel_id=(\d+)") or fusion.name)
        roles = {i.target for i in inside.instructions}
        if "AsyncCollectiveStart" in roles:
            pending[channel] = self._begin(computation, fusion, timeline)
        elif channel in pending and "AsyncCollectiveDone" in roles:
            timeline.wait(pending.pop(channel))
        else:
            if channel not in pending:
                timeline.wait(self._begin(computation, fusion, timeline))
            if self.module.flops(computation, fusion):
                self._compute(computation, fusion, timeline)

    def _follow(self, line: Instruction, pending: dict[str, Transfer], course: _Course, timeline: Timeline) -> None:
        """A `done` waits for what it is given; an `update` hands it on."""
        sent = next((pending[name] for name in line.operands if name in pending), None)
        sent = sent or course.passed.get(_channel(line))
        if sent is None:
            return
        if line.opcode.endswith("-update"):
            pending[line.name] = sent
        else:
            timeline.wait(sent)

    def _compute(self, computation: Computation, instruction: Instruction, timeline: Timeline) -> None:
        target = instruction.target
        if target in _NO_WORK:
            return
        if self.module.to_host(computation, instruction):
            timeline.wait(self._to_host(computation, instruction, timeline))
            return
        work = self._work(computation, instruction)
        timeline.run(work, instruction.name, instruction.op_name)
        if not work.flops and (target or instruction.opcode in _BY_BYTES_ALONE):
            timeline.unknown[target or instruction.opcode] += work.n_bytes

    def _work(self, computation: Computation, instruction: Instruction) -> Work:
        """The roofline: whichever of arithmetic and memory takes longer, and never less than a launch."""
        key = computation.name, instruction.name
        if key not in self._known:
            self._known[key] = self._roofline(computation, instruction)
        return self._known[key]

    def _roofline(self, computation: Computation, instruction: Instruction) -> Work:
        rates, module = self.rates, self.module
        n_bytes = module.traffic_bytes(computation, instruction)
        flops = module.flops(computation, instruction)
        if kernel := module.attention(computation, instruction):
            category = "attention"
            arithmetic_s = rates.attention_s(
                kernel.flops, kernel.dtype, head=kernel.head, length=kernel.length, causal=kernel.causal,
                backward=kernel.backward,
            )  # fmt: skip
        elif flops and instruction.cycles is not None:
            category, arithmetic_s = "matmul", rates.cycles_s(instruction.cycles)
        elif flops:
            products = module.products(computation, instruction)
            category, arithmetic_s = "matmul", sum(rates.product_in_step_s(product) for product in products)
        else:
            category, arithmetic_s = "optimizer" if "/optimizer/" in instruction.op_name else "memory", 0.0
        if rates.device.operation_s:
            arithmetic_s += rates.operations_s(operations.elements(module.computations, computation, instruction))
        return Work(category, arithmetic_s, rates.memory_s(n_bytes), rates.launch_s, flops, n_bytes)

    def _tell_bubble(self, timeline: Timeline) -> None:
        """Set apart what a stage computes on nothing. All stages keep step (`transformer/pipeline.py`): of v M + S - 1
        ticks each way S - 1 are idle, and the steady phase, the longest loop, has a tick each way in an iteration. What
        it does in branches (the ends of the model) no idle tick does."""
        stages, steady = self.layout.pipeline, self._steady_ticks
        loop = max((loop for loop in self._loops if loop.trips <= steady), key=lambda loop: loop.seconds, default=None)
        if stages == 1 or loop is None:
            return
        ticks = loop.trips * max(1, round(steady / loop.trips))  # the compiler may have unrolled it
        for name, seconds in loop.breakdown_s.items():
            idle_s = seconds * (stages - 1) / ticks
            timeline.breakdown_s[name] -= idle_s
            timeline.breakdown_s["bubble"] += idle_s
        for name, flops in loop.flops.items():
            timeline.flops[name] -= flops * (stages - 1) / ticks


def _channel(instruction: Instruction) -> str:
    """Of a `send` or `recv` and of its `done`."""
    number = instruction.attribute(r"channel_id=(\d+)")
    return f"{instruction.opcode.removesuffix('-done')} {number}"


def _copied_bytes(start: Instruction) -> float:
    """Of a copy: its source and result are the first of its shapes, what is not sliced is not moved, and one that lies
    in fast memory costs nothing."""
    ends = [s for s in start.shapes if s.dims][:2]
    return float(min((s.n_bytes for s in ends), default=0) * max(1, sum(not s.space for s in ends)))
