"""Tables of published measurements: a row is a training run. The columns are described in docs/validation.md."""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from experiments.validation.words import first_number
from transformer.errors import RequestError, nearest

NEEDED = ("source_id", "model_name", "layers", "d_model", "n_heads", "seq_len", "device", "n_devices")
MEASURED = ("step_time_s", "tokens_per_s_per_device", "tflops_per_device", "mfu")


@dataclass(frozen=True)
class Row:
    """One run as printed. What a cell says is text until it is asked for."""

    cells: Mapping[str, str]
    place: str  # file and line, for messages

    def text(self, column: str) -> str:
        """The cell, stripped; blank where the table has no such column."""
        return self.cells.get(column, "").strip()

    def number(self, column: str) -> float | None:
        """A cell that must be a number if it is not blank. RequestError names cell and place."""
        text = self.text(column)
        if not text:
            return None
        try:
            value = float(text)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError
        except ValueError:
            raise RequestError(f"{self.place}: {column}={text!r}: expected a number of 0 or more, or blank") from None
        return value

    def count(self, column: str) -> int | None:
        """As `number`, and whole. RequestError where it is none."""
        value = self.number(column)
        if value is not None and value != int(value):
            near = max(round(value), 1)
            raise RequestError(f"{self.place}: {column}={value:g}: expected a whole number; nearest: {near}")
        return None if value is None else int(value)

    def size(self, column: str) -> int | None:
        """A cell of free text that may hold a count, as in `2 pods`; None where it holds none, or 0."""
        value = first_number(self.text(column))
        return int(value) if value and value == int(value) else None


def read(path: str) -> list[Row]:
    """The rows of a table. RequestError where it cannot be read, lacks a column, or has no rows."""
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            raw = [(reader.line_num, cells) for cells in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RequestError(f"--table={path}: cannot be read as CSV ({error})") from None
    for column in NEEDED:
        if column not in columns:
            raise RequestError(f"--table={path}: no column {column!r}; {nearest(column, columns)}")
    if not set(MEASURED) & set(columns):
        raise RequestError(f"--table={path}: nothing to compare with: expected one of {', '.join(MEASURED)}")
    if not raw:
        raise RequestError(f"--table={path}: no rows")
    rows = []
    for line, cells in raw:
        place = f"{Path(path).name}, line {line}"
        if None in cells or None in cells.values():
            raise RequestError(f"{place}: expected {len(columns)} cells, as in the header")
        rows.append(Row(cells, place))
    return rows
