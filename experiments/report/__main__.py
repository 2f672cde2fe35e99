"""The page of a folder of records: `python -m experiments.report DIR [--tokens=300e9] [--facts=my.toml] [--json]`.

Writes DIR/report.html (one file, opens without a network), DIR/report.md and DIR/records.csv from DIR/records.jsonl,
and prints a summary. Rungs are priced here, so a new price needs no new run. A thousand records take a few seconds;
with --tokens their whole runs are simulated too, 25 records a second (none with --runs=0).
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from experiments import cost, entry, hardware, records, runs
from experiments.report import bars, curves, headline, lines, tables, text
from experiments.report.page import page
from transformer.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class Request(runs.Asked):
    """What the command line says."""

    folder: str = entry.positional("DIR, the folder that holds records.jsonl")
    tokens: float | None = entry.flag(None, "tokens of a whole run, such as 300e9: prices the run")
    facts: str | None = entry.flag(None, "a TOML file that adds or overrides facts and prices")
    json: bool = entry.flag(False, "print the rungs as JSON on standard output, all else on standard error")

    def __post_init__(self) -> None:
        runs.Asked.__post_init__(self)  # a class with slots has no super()
        if self.tokens is not None and not (math.isfinite(self.tokens) and self.tokens > 0):
            raise RequestError(f"--tokens={self.tokens}: expected a positive number of tokens, such as 300e9")


def main(request: Request) -> None:
    """Read everything, make everything, and only then write: a bad record changes no file."""
    folder = Path(request.folder)
    found = records.read(folder)
    if not found:
        raise RequestError(f"{folder / records.FILE} holds no record: run experiments.ladder or experiments.forecast")
    facts = hardware.load(request.facts)
    rungs = curves.frame(found, [_price(record, facts, request) for record in found])
    along = curves.points(rungs)
    top = (headline.title(rungs), headline.sentences(rungs, request.tokens), headline.cards(rungs, request.tokens))
    made = tables.tables(rungs, found, request.tokens)
    figures = lines.figures(along, request.tokens) + bars.figures(along)
    written = {
        "report.html": page(*top, figures, made),
        "report.md": text.markdown(*top, made),
        "records.csv": text.csv(found),
    }
    for name, whole in written.items():
        records.write_whole(folder / name, whole)
    if request.json:
        sys.stdout.write(text.rungs_json(rungs))
    console = Console(stderr=request.json)
    if not console.is_terminal:
        console = Console(stderr=request.json, width=140)  # a pipe has no width, and 80 would fold the layouts
    for table in tables.summary(rungs):
        console.print(_rich(table), "")
    for name in written:
        console.print(Text(str(folder / name)))


def _price(record: records.Record, facts: hardware.Facts, request: Request) -> dict[str, Any]:
    """A device that was measured may have no facts: then it has no price, but its curve all the same."""
    try:
        facts.device(record["device"])
    except RequestError as error:
        return {"why_not": str(error)}
    return cost.rows([record], facts, tokens=request.tokens, asked=request)[0]


def _rich(table: tables.Table) -> RichTable:
    drawn = RichTable(title=Text(table.title), title_justify="left", box=None, pad_edge=False)
    for number, column in enumerate(table.columns):
        drawn.add_column(Text(column), justify="left" if number < table.n_words else "right", overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    return drawn


if __name__ == "__main__":
    entry.start(main, Request)
