"""Scheduled modules small enough to count by hand, and what a test asks of one."""

from experiments.forecast.hlo import Module, parse
from experiments.forecast.instructions import Instruction


def module(*computations: str) -> Module:
    """A scheduled module. Lines are dedented; each computation's first line is its head."""
    text = "HloModule test, is_scheduled=true, entry_computation_layout={()->()}\n"
    for computation in computations:
        head, *body = [line.strip() for line in computation.strip().splitlines()]
        text += "\n".join(["", head, *(f"  {line}" for line in body), "}", ""])
    return parse(text)


def entry(*lines: str) -> str:
    return "\n".join(["ENTRY %main (p: f32[]) -> f32[] {", *lines])


def only(m: Module, name: str) -> Instruction:
    return m.computations[m.entry].by_name[name]


def flops(m: Module, name: str) -> float:
    return m.flops(m.computations[m.entry], only(m, name))


def traffic(m: Module, name: str) -> float:
    return m.traffic_bytes(m.computations[m.entry], only(m, name))


def total_flops(m: Module, name: str) -> float:
    """Loops multiplied out."""
    total = 0.0
    for instruction in m.computations[name].instructions:
        if instruction.opcode == "while":
            body = instruction.attribute(r"body=%?([\w.\-]+)")
            assert body is not None
            total += (m.trip_count(instruction) or 1) * total_flops(m, body)
        else:
            total += m.flops(m.computations[name], instruction)
    return total
