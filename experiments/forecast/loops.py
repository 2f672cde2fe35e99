"""How often a loop runs, where the compiler does not print it: its counter is followed and its condition asked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from experiments.forecast.instructions import Computation, Instruction

LONGEST = 100_000  # iterations that are counted at most

Value = int | bool | None
"""Of a whole number; None where data decides it, or where it is no whole number."""
Given = Callable[[int], Value]
"""The values of what a computation is given: elements of its one tuple, or else its parameters, by index."""

_TWO: Mapping[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "maximum": max,
    "minimum": min,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
}
_COMPARE: Mapping[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}
_SAME = ("copy", "bitcast", "convert", "reshape", "broadcast", "opt-barrier")


@dataclass(frozen=True)
class Trips:
    """Counts the trips of a program's loops."""

    computations: Mapping[str, Computation]

    def of(self, loop: Instruction) -> int | None:
        """Iterations of a `while`; None if its condition asks for more than counters and constants.

        What the condition asks for must change by the same in every iteration. A counter that starts at what cannot
        be read here is taken to start at 0, as XLA's loops do.
        """
        condition, body = self._called(loop, "condition"), self._called(loop, "body")
        asked = sorted({int(i.attribute(r"index=(\d+)") or 0) for i in _elements(condition)})
        first = {i: self._start(loop, i) for i in asked}
        second = {i: self._next(body, i, first) for i in asked}
        if any(value is None for value in second.values()):
            return None
        gains = {i: int(second[i] or 0) - int(first[i] or 0) for i in asked}
        for n in range(LONGEST if any(gains.values()) else 1):
            goes_on = self._value(condition, condition.root.name, lambda i, n=n: int(first[i] or 0) + n * gains[i])
            if goes_on is None:
                return None
            if not goes_on:
                return n
        return None

    def _called(self, instruction: Instruction, as_what: str) -> Computation:
        name = instruction.attribute(rf"{as_what}=%?([\w.\-]+)")
        assert name is not None, instruction.name
        return self.computations[name]

    def _start(self, loop: Instruction, index: int) -> Value:
        place = self._home(loop)
        given = place.by_name.get(loop.operands[0]) if place else None
        if place is None or given is None or given.opcode != "tuple":
            return 0
        return self._value(place, given.operands[index], lambda _: None) or 0

    def _home(self, loop: Instruction) -> Computation | None:
        return next((c for c in self.computations.values() if c.by_name.get(loop.name) is loop), None)

    def _next(self, body: Computation, index: int, now: Mapping[int, Value]) -> Value:
        if body.root.opcode != "tuple":
            return None
        return self._value(body, body.root.operands[index], lambda i: now.get(i))

    def _value(self, computation: Computation, name: str, given: Given) -> Value:
        line = computation.by_name.get(name)
        if line is None or any(shape.dims for shape in line.shapes[:1]):
            return None
        opcode = line.opcode
        if opcode == "constant":
            return {"true": True, "false": False}.get(line.value, _whole(line.value))
        if opcode == "parameter":
            return given(int(line.value))
        if opcode == "get-tuple-element":
            return self._element(computation, line.operands[0], int(line.attribute(r"index=(\d+)") or 0), given)
        if opcode in _SAME:
            return self._value(computation, line.operands[0], given)
        values = [self._value(computation, operand, given) for operand in line.operands]
        if opcode in ("fusion", "call"):
            inner = self.computations[line.called[0]]
            return self._value(inner, inner.root.name, lambda i: values[i])
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        if opcode == "compare":
            return _COMPARE[line.attribute(r"direction=(\w+)") or ""](*known)
        if opcode == "not":
            return not known[0]
        if opcode == "negate":
            return -known[0]
        return _TWO[opcode](*known) if opcode in _TWO else None

    def _element(self, computation: Computation, name: str, index: int, given: Given) -> Value:
        """Of a tuple."""
        line = computation.by_name[name]
        if line.opcode == "parameter":
            return given(index)
        if line.opcode == "tuple":
            return self._value(computation, line.operands[index], given)
        if line.opcode in _SAME:
            return self._element(computation, line.operands[0], index, given)
        if line.opcode not in ("fusion", "call"):
            return None
        values = [self._value(computation, operand, given) for operand in line.operands]
        inner = self.computations[line.called[0]]
        return self._element(inner, inner.root.name, index, lambda i: values[i])


def _elements(condition: Computation) -> list[Instruction]:
    """What the condition takes out of its tuple."""
    return [i for i in condition.instructions if i.opcode == "get-tuple-element"]


def _whole(text: str) -> int | None:
    return int(text) if text.lstrip("-").isdigit() else None
