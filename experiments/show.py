"""What a person sees while a verb runs and when it ends: progress on standard error, a table on standard output."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import rich.progress
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.distributed import is_lead
from experiments.records import Record, layout_text

Advance = Callable[[str], None]


def remark(line: str) -> None:
    """One line on standard error, from the first process alone."""
    if is_lead():
        print(line, file=sys.stderr)


class Progress:
    """Rungs done, the step that runs, its rate, the time left. Silent in every process but the first."""

    def __init__(self, title: str, total: int) -> None:
        self._bars = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[rate]}"),
            console=Console(stderr=True),
            auto_refresh=False,  # a second thread that wakes up costs a compilation beside it a third more time
            disable=not is_lead(),
        )
        self._whole = self._bars.add_task(title, total=total, rate="")

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    @contextmanager
    def rung(self, name: str, steps: int) -> Iterator[Advance]:
        """A bar for one rung; the function it gives marks a step done and shows a rate."""
        bar = self._bars.add_task(f"  {name}", total=steps, rate="")
        self._bars.refresh()

        def advance(rate: str) -> None:
            self._bars.update(bar, advance=1, rate=rate)
            self._bars.refresh()

        try:
            yield advance
        finally:
            self._bars.update(self._whole, advance=1)
            self._bars.refresh()


def table(records: list[Record], *, as_json: bool) -> None:
    """One row a record on standard output. Measured and forecast never share a table."""
    if as_json:
        json.dump(records, sys.stdout, indent=2)
        print()
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    for kind in ("measured", "forecast"):
        rows = [r for r in records if r["kind"] == kind]
        if rows:
            console.print(_table(kind, rows))
            for line in _remarks(rows):
                console.print(line, highlight=False, markup=False)


def _table(kind: str, rows: list[Record]) -> Table:
    first = rows[0]
    table = Table(
        title=f"{kind}: {first['preset']} on {first['device']}, {first['scaling']} scaling", title_justify="left"
    )
    for name in ("devices", "layout", "step [s]", "tokens/s", "MFU full [%]", "MFU causal [%]", "memory [GB]", "fits"):
        table.add_column(escape(name), justify="left" if name in ("layout", "fits") else "right")
    for r in rows:
        step_s, mfu, memory = r.get("step_s") or {}, r.get("mfu") or {}, r.get("memory_bytes") or {}
        table.add_row(
            f"{r['n_devices']:,}", layout_text(r["layout"]), _number(step_s.get("median"), ".4g"),
            _number(r.get("tokens_per_s"), ",.0f"), _percent(mfu.get("full")), _percent(mfu.get("causal")),
            _number(memory["total"] / 1e9 if memory else None, ".3g"),
            "failed" if r["failed"] else {True: "yes", False: "no", None: "-"}[r.get("fits")],
        )  # fmt: skip
    return table


def _remarks(rows: list[Record]) -> list[str]:
    """What a reader of the table must know: why rungs failed, and what was measured on."""
    failed = [f"{r['n_devices']:,} devices failed: {r['failed']}" for r in rows if r["failed"]]
    warned = [_warned(r) for r in rows if r.get("warnings")]
    return failed + warned + sorted({f"Note: {r['note']}." for r in rows if r.get("note")})


def _warned(record: Record) -> str:
    first, n = record["warnings"][0], sum(w["times"] for w in record["warnings"])
    return (
        f"{record['n_devices']:,} devices: involuntarily, the compiler gathers tensors whole, {n} times, first at "
        f"{first['origin']['where'] or '?'} ({first['origin']['module']}); experiments.layouts --explain says more"
    )


def _percent(value: float | None) -> str:
    return _number(None if value is None else 100 * value, ".1f")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
