"""Where two timelines differ most: a forecast against a profile of the same step, or two profiles.

    python -m experiments.forecast --preset=gpt2-124m --devices=8 --trace --out=runs/forecast
    python -m experiments.compare runs/forecast/gpt2-124m_h100-sxm_8.trace.json.gz runs/profile

Takes about a second. A profile is what `jax.profiler.trace` writes. Instructions bear the names that the compiler gave
them: two that it compiled apart (another JAX, other flags, kernels chosen by timing them) meet by module only.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments import entry
from experiments.timelines import Difference, Ledger, differences, read


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    a: str = entry.positional("a trace, or a folder with one")
    b: str = entry.positional("the trace to compare it with")
    by: Literal["module", "instruction"] = entry.flag("module", "what is compared")
    steps: int | None = entry.flag(None, "steps in the second trace; default: as many as the program's runs in it")
    top: int = entry.flag(20, "how many differences are shown")
    json: bool = entry.flag(False, "print them all as JSON")


def main(request: Request) -> None:
    a, b = read(Path(request.a)), read(Path(request.b), request.steps)
    found = differences(a, b, request.by)
    if request.json:
        json.dump([dataclasses.asdict(d) | {"more_s": d.more_s} for d in found], sys.stdout, indent=1)
        print()
    else:
        show(a, b, found, request)


def show(a: Ledger, b: Ledger, found: list[Difference], request: Request) -> None:
    shown = found[: request.top]
    table = Table(box=None, pad_edge=False)
    table.add_column(request.by, overflow="fold")
    for column in ("first [ms]", "second [ms]", "more [ms]"):
        table.add_column(Text(column), justify="right")
    for d in shown:
        table.add_row(Text(d.name), _ms(d.a_s), _ms(d.b_s), f"{1e3 * d.more_s:+.3f}")
    rest = found[request.top :]
    if rest:
        table.add_row(f"{len(rest)} more", "", "", f"{1e3 * sum(d.more_s for d in rest):+.3f}")
    sums = [sum(one.seconds for one in ledger.ran.values()) for ledger in (a, b)]
    table.add_row("all", _ms(sums[0]), _ms(sums[1]), f"{1e3 * (sums[1] - sums[0]):+.3f}")
    print(f"first: {_said(request.a, a)}; second: {_said(request.b, b)}; of one step")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _said(path: str, ledger: Ledger) -> str:
    return f"{Path(path).name} ({ledger.steps} {'step' if ledger.steps == 1 else 'steps'})"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.3f}"


if __name__ == "__main__":
    entry.start(main, Request)
