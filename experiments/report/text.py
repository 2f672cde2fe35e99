"""The report as Markdown, and the records as CSV."""

import json
from collections.abc import Sequence
from typing import Any

import pandas as pd

from experiments.records import Record
from experiments.report.curves import Frame
from experiments.report.headline import Card
from experiments.report.tables import Table

_SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\`*_[]<>|"} | {"\n": " "})


def markdown(title: str, sentences: Sequence[str], cards: Sequence[Card], tables: Sequence[Table]) -> str:
    """The page's headline and tables. The same records give the same text: it holds no clock and no path."""
    lines = [f"# {_escape(title)}", "", *(f"- {_escape(sentence)}" for sentence in sentences), ""]
    for card in cards:
        lines += [f"## Largest rung, {card.kind}: {_escape(card.title)}", "", _escape(card.subtitle), ""]
        lines += _grid(["", "", ""], [list(number) for number in card.numbers], 1)
    for table in tables:
        lines += [f"## {_escape(table.title)}", "", _escape(table.remark), ""]
        lines += _grid(table.columns, table.rows, table.n_words)
    return "\n".join(lines).rstrip() + "\n"


def csv(records: Sequence[Record]) -> str:
    """One line per record, one column per key (`step_s.median`); a list is JSON text. Units are those of the record."""
    flat = pd.json_normalize([_lists_as_text(record) for record in records])
    return flat.to_csv(index=False, lineterminator="\n")


def rungs_json(rungs: Frame) -> str:
    """The rungs and what was derived of them as a JSON list; what is not known is null."""
    told = rungs.drop(columns=["rung", "variant", "batch"]).rename(
        columns={"name": "ladder", "verdict": "does_not_run"}
    )
    return told.to_json(orient="records", indent=2, double_precision=15) + "\n"


def _lists_as_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists_as_text(inner) for key, inner in value.items()}
    return json.dumps(value) if isinstance(value, list) else value


def _grid(columns: list[str], rows: list[list[str]], n_words: int) -> list[str]:
    rule = ["---" if number < n_words else "---:" for number in range(len(columns))]
    return [
        *("| " + " | ".join(row) + " |" for row in (map(_escape, columns), rule, *(map(_escape, r) for r in rows))),
        "",
    ]


def _escape(text: str) -> str:
    return text.translate(_SPECIAL)
