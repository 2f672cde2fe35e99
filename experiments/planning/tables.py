"""A plan on standard output."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.planning.rungs import Row

OPTIONS: Mapping[str, str] = {
    "n_devices": "devices", "layout": "layout", "remat": "remat", "micro_batch_seqs": "micro-batch",
    "microbatches": "microbatches", "step_s": "closed form [s]", "simulated_step_s": "simulated [s]",
    "memory_bytes": "memory [GB]", "usd_per_mtok": "USD/Mtok", "why": "why",
}  # fmt: skip
RUNGS: Mapping[str, str] = {
    "n_devices": "devices", "layout": "layout", "days": "days", "usd": "USD", "goodput": "goodput",
    "makes_it": "makes it", "why": "why",
}  # fmt: skip
_WORDS = ("layout", "remat", "why")


def show(title: str, columns: Mapping[str, str], rows: Sequence[Row]) -> None:
    """A table; columns that no row fills are left out."""
    console = Console(width=None if sys.stdout.isatty() else 180)
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    shown = {key: name for key, name in columns.items() if any(row[key] is not None for row in rows)}
    for key, name in shown.items():
        table.add_column(Text(name), justify="left" if key in _WORDS else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_text(key, row)) for key in shown))
    console.print(table)


def lines(said: Iterable[str]) -> None:
    """Lines that may be copied: as long as they are."""
    for line in said:
        print(line)


def _text(key: str, row: Row) -> str:
    value: Any = row[key]
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key == "memory_bytes":
        compiled = row["simulated_memory_bytes"]
        return f"{value / 1e9:,.0f}" + (f" ({compiled / 1e9:,.0f} compiled)" if compiled else "")
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if isinstance(value, int) or value >= 1000 else f"{value:.4g}"
