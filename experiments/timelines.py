"""Timelines in Chrome's trace format, as JAX's profiler and the forecast write them: what ran how long. No JAX."""

import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformer.errors import RequestError

_CONTAINERS = re.compile(r"(while|conditional|call)(\.|$)")  # time of theirs is time of what they contain
_SCAFFOLD = frozenset(
    {"while", "body", "cond", "closed_call", "eval_jaxpr", "checkpoint", "rematted_computation", "shard_map", "branch"}
)


@dataclass(slots=True)
class Ran:
    """One instruction of a program, all executions of a step together."""

    seconds: float = 0.0
    count: float = 0.0
    path: str = ""


@dataclass
class Ledger:
    """What a step ran, by instruction."""

    program: str
    steps: int
    ran: dict[str, Ran] = field(default_factory=dict)


def module_path(op_name: str) -> str:
    """The modules in what JAX calls an instruction: without the program, loops and transformations, of which backward
    and recomputation are said at the end.

    >>> module_path("jit(_step)/transpose(jvp(Model))/decoder/while/body/checkpoint/rematted_computation/ffn/dot")
    'decoder/ffn/dot (backward, again)'
    """
    parts = [part for part in op_name.split("/") if part and part not in _SCAFFOLD and not part.startswith("branch_")]
    kept = [part for part in parts if "(" not in part]
    said = ["backward"] * ("transpose(" in op_name) + ["again"] * ("rematted_computation" in op_name)
    return "/".join(kept) + (f" ({', '.join(said)})" if kept and said else "")


def read(path: Path, steps: int | None = None) -> Ledger:
    """The program that ran longest in a trace: a file, or a folder as `jax.profiler` writes it (its newest).

    `steps` that were recorded: as given; else as many as the program's runs; else as often as its rarest instruction
    ran. RequestError if there is no trace, or nothing of a compiled program in it.
    """
    events = _events(path)
    by_program: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if _instruction(event) and not _CONTAINERS.match(_instruction(event)):
            by_program[event["args"].get("hlo_module", "")].append(event)
    if not by_program:
        raise RequestError(f"{path} has no instructions of a compiled program: record a step with jax.profiler.trace")
    program, run = max(by_program.items(), key=lambda item: sum(event.get("dur", 0.0) for event in item[1]))
    runs = {event["args"]["run_id"] for event in run if "run_id" in event["args"]}
    times = Counter[str]()
    for event in run:
        times[_instruction(event)] += event["args"].get("times", 1)
    n = steps or len(runs) or min(times.values())
    ledger = Ledger(program, n)
    for event in run:
        args, name = event["args"], _instruction(event)
        one = ledger.ran.setdefault(name, Ran(path=module_path(args.get("tf_op") or "")))
        one.seconds += event.get("dur", 0.0) * 1e-6 * args.get("times", 1) / n
        one.count += args.get("times", 1) / n
    return ledger


def _instruction(event: dict[str, Any]) -> str:
    """Its name, "" if the event is none: TPUs name the event itself by it."""
    args = event.get("args") or {}
    if event.get("ph") != "X":
        return ""
    return args.get("hlo_op") or (event["name"] if "hlo_category" in args else "")


def _events(path: Path) -> list[dict[str, Any]]:
    files = [path] if path.is_file() else sorted(path.rglob("*.trace.json*"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise RequestError(f"no trace at {path}: expected a *.trace.json.gz, or a folder with one")
    data = files[-1].read_bytes()
    try:
        return json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)["traceEvents"]
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{files[-1]} is no trace in Chrome's format: {error}") from None


@dataclass(frozen=True, slots=True)
class Difference:
    """Seconds of a step that each of two timelines gave to the same thing; None where it has no such."""

    name: str
    a_s: float | None
    b_s: float | None

    @property
    def more_s(self) -> float:
        """Of the second over the first."""
        return (self.b_s or 0.0) - (self.a_s or 0.0)


def differences(a: Ledger, b: Ledger, by: str) -> list[Difference]:
    """Where two timelines differ, the most first: by "instruction", or by "module".

    A trace that knows no modules (the CPU's) has them from the other, by the instruction's name."""
    paths = {name: one.path for ledger in (a, b) for name, one in ledger.ran.items() if one.path}

    def of_module(name: str) -> str:
        return paths.get(name) or re.sub(r"[.\d]+$", "", name)

    key: Callable[[str], str] = of_module if by == "module" else str
    sums = [defaultdict[str, float](float) for _ in range(2)]
    for ledger, total in zip((a, b), sums, strict=True):
        for name, one in ledger.ran.items():
            total[key(name)] += one.seconds
    found = [Difference(name, sums[0].get(name), sums[1].get(name)) for name in {**sums[0], **sums[1]}]
    return sorted(found, key=lambda d: (-abs(d.more_s), d.name))
