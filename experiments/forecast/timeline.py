"""Streams played against each other: what one device computes, and what travels meanwhile.

Whatever runs asks for a part of the device: of its memory's bandwidth, and of its multiprocessors. Where together they
ask for more than there is, bandwidth is shared max-min (no one gets less than an equal share unless it asks for
less), and each runs as fast as its part lets it.
"""

import copy
import dataclasses
import math
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import NamedTuple

MOST = 0.9  # of the multiprocessors, that all that travels takes: kernels go on, however many streams there are
ENDED_S = 1e-15  # what is left of a transfer that has ended, but for rounding

Sums = defaultdict[str, float]


def _zeros() -> Sums:
    return defaultdict(float)


class Work(NamedTuple):
    """A kernel on the compute stream, were it alone: it takes the longest of the three."""

    category: str
    arithmetic_s: float = 0.0
    memory_s: float = 0.0
    least_s: float = 0.0  # from one launch to the next
    flops: float = 0.0
    n_bytes: float = 0.0

    @property
    def busy_s(self) -> float:
        return max(self.arithmetic_s, self.memory_s)

    @property
    def alone_s(self) -> float:
        return max(self.busy_s, self.least_s)


@dataclass(slots=True)
class Transfer:
    """Something on a stream of its own: a collective, a copy. `left_s` is what it would still take alone."""

    kind: str  # "collective", "p2p" or "copy"
    axis: str  # the mesh axes that it lies along, or "copy"
    left_s: float
    name: str = ""
    op_name: str = ""
    memory: float = 0.0  # parts of the device that it takes: of the memory's bandwidth,
    multiprocessors: float = 0.0
    n_bytes: float = 0.0
    serial: int = 0  # that no other of its timeline has
    began_s: float | None = None


@dataclass(slots=True)
class Span:
    """What a thread did from when to when; `times` counts the iterations that it stands for."""

    thread: str
    name: str
    begin_s: float
    seconds: float
    category: str
    op_name: str = ""
    flops: float = 0.0
    n_bytes: float = 0.0
    times: int = 1


_SUMS = (
    "breakdown_s", "hidden_s", "flops", "traffic_bytes", "unknown", "collective_bytes", "branches_s", "branch_flops",
)  # fmt: skip


@dataclass
class Timeline:
    """The streams and what they were used for, in seconds."""

    compute_s: float = 0.0  # where the compute stream stands; all streams have been played until then
    breakdown_s: Sums = field(default_factory=_zeros)  # adds up to compute_s
    hidden_s: Sums = field(default_factory=_zeros)  # by axis, of what travelled: not waited for
    flops: Sums = field(default_factory=_zeros)  # by category
    traffic_bytes: Sums = field(default_factory=_zeros)  # of the device's memory, by category
    unknown: Sums = field(default_factory=_zeros)  # bytes of what is costed by them alone
    collective_bytes: Sums = field(default_factory=_zeros)  # of one device's whole arrays, by "axis kind"
    branches_s: Sums = field(default_factory=_zeros)  # of breakdown_s, what ran in branches of conditionals
    branch_flops: Sums = field(default_factory=_zeros)  # and of flops
    streams: dict[str, deque[Transfer]] = field(default_factory=dict)  # in each, one after another
    n_sent: int = 0
    spans: list[Span] | None = None  # None: not kept

    def run(self, work: Work, name: str = "", op_name: str = "") -> None:
        """Compute, slowed by what travels meanwhile. Seconds beyond arithmetic and memory are the host's; those beyond
        what the kernel would take alone are contention."""
        begin_s, left = self.compute_s, 1.0
        while left > 1e-12 and work.alone_s:
            seconds, speeds = self._shared(work)
            step_s = min(left * seconds, *(head.left_s / speed for head, speed in speeds), math.inf)
            self._advance(step_s, speeds)
            left -= step_s / seconds
            self.breakdown_s["contention"] += step_s * (1 - work.alone_s / seconds)
        self.breakdown_s[work.category] += work.busy_s
        self.breakdown_s["host"] += work.alone_s - work.busy_s
        self.count(work)
        if self.spans is not None:
            seconds = self.compute_s - begin_s
            self.spans.append(Span("compute", name, begin_s, seconds, work.category, op_name, work.flops, work.n_bytes))

    def count(self, work: Work) -> None:
        """What work multiplies and moves, whoever does it when."""
        self.flops[work.category] += work.flops
        self.traffic_bytes[work.category] += work.n_bytes

    def send(self, stream: str, transfer: Transfer) -> Transfer:
        """Put something on a stream, behind what is there."""
        self.n_sent += 1
        transfer.serial = self.n_sent
        if transfer.left_s > 0:
            self.streams.setdefault(stream, deque()).append(transfer)
        return transfer

    def wait(self, transfer: Transfer) -> None:
        """Let the compute stream stand until something has ended: what its stream carries meanwhile is exposed."""
        begin_s = self.compute_s
        queue = next((q for q in self.streams.values() if any(t.serial == transfer.serial for t in q)), deque())
        while any(t.serial == transfer.serial for t in queue):
            _, speeds = self._shared(None)
            step_s, axis = min(head.left_s / speed for head, speed in speeds), queue[0].axis
            self._advance(step_s, speeds)
            self.breakdown_s[f"exposed_{axis}"] += step_s
            self.hidden_s[axis] -= step_s
        if self.spans is not None and self.compute_s > begin_s:
            name, seconds = f"wait for {transfer.name}", self.compute_s - begin_s
            self.spans.append(Span("compute", name, begin_s, seconds, f"exposed_{transfer.axis}", transfer.op_name))

    def _shared(self, work: Work | None) -> tuple[float, list[tuple[Transfer, float]]]:
        """Seconds of a kernel as things stand, and at which part of its speed the first of every stream travels."""
        heads = [queue[0] for queue in self.streams.values() if queue]
        if not heads:
            return work.alone_s if work else 0.0, []
        arithmetic_s = seconds = asked = 0.0
        if work:
            arithmetic_s = work.arithmetic_s / (1 - min(MOST, sum(head.multiprocessors for head in heads)))
            seconds = max(arithmetic_s, work.memory_s, work.least_s)
            asked = work.memory_s / seconds
        had, *parts = max_min([asked, *(head.memory for head in heads)])
        if work and had:
            seconds = max(seconds, work.memory_s / had)
        speeds = [part / head.memory if head.memory else 1.0 for head, part in zip(heads, parts, strict=True)]
        return seconds, list(zip(heads, speeds, strict=True))

    def _advance(self, seconds: float, speeds: list[tuple[Transfer, float]]) -> None:
        """Let time pass on all streams."""
        for head, speed in speeds:
            head.began_s = self.compute_s if head.began_s is None else head.began_s
            head.left_s -= seconds * speed
            self.hidden_s[head.axis] += seconds
        self.compute_s += seconds
        for queue in self.streams.values():
            if queue and queue[0].left_s <= ENDED_S:
                self._end(queue.popleft())

    def _end(self, done: Transfer) -> None:
        if self.spans is not None and done.began_s is not None:
            thread = done.kind if done.kind == done.axis else f"{done.kind} {done.axis}"
            seconds = self.compute_s - done.began_s
            self.spans.append(
                Span(thread, done.name, done.began_s, seconds, done.kind, done.op_name, 0.0, done.n_bytes)
            )

    def repeat(self, times: int, before: "Timeline", name: str = "") -> None:
        """Add what was added since `before` another `times` times."""
        for key in _SUMS:
            now, then = getattr(self, key), getattr(before, key)
            for part in now:
                now[part] += times * (now[part] - then.get(part, 0.0))
        begin_s, shift_s = self.compute_s, times * (self.compute_s - before.compute_s)
        self.compute_s += shift_s
        for queue in self.streams.values():
            for transfer in queue:
                transfer.began_s = None if transfer.began_s is None else transfer.began_s + shift_s
        if self.spans is not None:
            for span in self.spans[len(before.spans or ()) :]:
                span.times *= 1 + times
            self.spans.append(Span("compute", f"{name}: {times} more as the last", begin_s, shift_s, "folded", times=0))

    def mark(self, name: str, begin_s: float) -> None:
        """Name what the compute stream did since, such as an iteration."""
        if self.spans is not None:
            self.spans.append(Span("compute", name, begin_s, self.compute_s - begin_s, "loop"))

    def tell_branch(self, before: "Timeline") -> None:
        """All since `before` ran in a branch."""
        for name in self.breakdown_s:
            self.branches_s[name] = before.branches_s[name] + self.breakdown_s[name] - before.breakdown_s[name]
        for name in self.flops:
            self.branch_flops[name] = before.branch_flops[name] + self.flops[name] - before.flops[name]

    def outside_branches(self, before: "Timeline") -> tuple[dict[str, float], dict[str, float]]:
        """Of breakdown_s and of flops, what was added since `before`, but for what ran in branches."""
        seconds = {
            name: self.breakdown_s[name] - before.breakdown_s[name] - self.branches_s[name] + before.branches_s[name]
            for name in self.breakdown_s
        }
        flops = {
            name: self.flops[name] - before.flops[name] - self.branch_flops[name] + before.branch_flops[name]
            for name in self.flops
        }
        return seconds, flops

    def copy(self) -> "Timeline":
        """One that can be played on without changing this one."""
        return dataclasses.replace(
            self,
            **{name: defaultdict(float, getattr(self, name)) for name in _SUMS},
            streams={name: deque(map(copy.copy, queue)) for name, queue in self.streams.items()},
            spans=None if self.spans is None else list(self.spans),
        )


def max_min(asked: list[float]) -> list[float]:
    """Parts of one that each gets: no one more than it asks for, and who gets less no less than any other.

    >>> max_min([0.2, 0.3]), max_min([0.2, 0.9, 0.7])
    ([0.2, 0.3], [0.2, 0.4, 0.4])
    """
    if sum(asked) <= 1:
        return asked
    parts, left = [0.0] * len(asked), 1.0
    order = sorted(range(len(asked)), key=asked.__getitem__)
    for n, i in enumerate(order):
        parts[i] = min(asked[i], left / (len(asked) - n))
        left -= parts[i]
    return parts
