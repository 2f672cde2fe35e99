"""The tables of the report, as text: the page and the Markdown show the same ones.

A table is of measured or of forecast rungs, never of both in one column.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.records import Record
from experiments.report import words
from experiments.report.curves import Frame, pairs

Columns = dict[str, Callable[[dict[str, Any]], str]]


@dataclass(frozen=True)
class Table:
    """A title, what to know before reading, and rows of text; the first `n_words` columns hold words, not numbers."""

    title: str
    remark: str
    columns: list[str]
    rows: list[list[str]]
    n_words: int


RUNG: Columns = {
    "Ladder": lambda r: r["name"],
    "Layout": lambda r: r["layout"] + (f" · {r['microbatches']} micro-batches" if (r["microbatches"] or 1) > 1 else ""),
    "Devices": lambda r: words.count(r["n_devices"]),
}
SPEED: Columns = {
    "Sequences": lambda r: words.count(r["global_batch_seqs"]),
    "Step": lambda r: words.seconds(r["step_s"]),
    "p10 to p90": lambda r: words.span(words.seconds, r["step_low_s"], r["step_high_s"]),
    "Tokens/s": lambda r: words.amount(r["tokens_per_s"]),
    "per device": lambda r: words.amount(r["tokens_per_s_per_device"]),
    "Efficiency": lambda r: words.percent(r["efficiency"]),
    "MFU full": lambda r: words.percent(r["mfu_full"]),
    "MFU causal": lambda r: words.percent(r["mfu_causal"]),
    "HFU": lambda r: words.percent(r["hfu"]),
}
MEMORY_AND_COST: Columns = {
    "Memory": lambda r: words.memory(r["memory_bytes"]),
    "Limit": lambda r: words.memory(r["limit_bytes"]),
    "Fits": lambda r: words.DASH if r["fits"] is None else "yes" if r["fits"] else "no",
    "USD per hour": lambda r: words.usd(r["usd_per_h"]),
    "USD per M tokens": lambda r: words.usd(r["usd_per_mtok"]),
}
RUN: Columns = {
    "Run": lambda r: words.days(r["run_days"]),
    "USD per run": lambda r: words.usd(r["run_usd"]),
    "at lowest to highest price": lambda r: words.span(words.usd, r["run_usd_low"], r["run_usd_high"]),
}
WHOLE_RUN: Columns = {
    "Goodput": lambda r: words.percent(r["run_goodput"]),
    "Run": lambda r: words.days(r["run_days_with_failures"]),
    "80 % of runs": lambda r: words.span(words.days, r["run_days_low"], r["run_days_high"]),
    "without failures": lambda r: words.days(r["run_days"]),
    "USD": lambda r: words.usd(r["run_usd_with_failures"]),
    "Failures": lambda r: words.count(r["run_failures"]),
    "Spare nodes": lambda r: words.count(r["run_spare_nodes"]),
}
CHECKPOINTS: Columns = {
    "Checkpoint": lambda r: words.seconds(r["run_checkpoint_s"]),
    "every": lambda r: words.seconds(r["run_interval_s"]),
    "simulated best": lambda r: words.seconds(r["run_interval_simulated_s"]),
    "Goodput": WHOLE_RUN["Goodput"],
}


def tables(rungs: Frame, records: Sequence[Record], tokens: float | None) -> list[Table]:
    """All tables that have a row: rungs, whole runs, pairs, rungs that do not run, breakdown, provenance, facts,
    prices."""
    runs = rungs[rungs["verdict"] == ""]
    made = []
    for kind in ("measured", "forecast"):
        made += [_speed(runs[runs["kind"] == kind], kind), _money(rungs[rungs["kind"] == kind], kind, tokens)]
        made += _whole_runs(runs[runs["kind"] == kind], kind, tokens) if tokens else []
    made += [_pairs(runs), _stopped(rungs), _breakdown(runs), _provenance(records), _facts(records)]
    made += [_assumed(records), _run_facts(runs), _prices(rungs)]
    return [table for table in made if table.rows]


def summary(rungs: Frame) -> list[Table]:
    """What fits into a terminal: the rungs of each ladder in short, pairs, and rungs that do not run."""
    columns = {name: write for name, write in RUNG.items() if name != "Ladder"}
    columns |= {name: SPEED[name] for name in ("Step", "Tokens/s", "Efficiency", "MFU full", "MFU causal")}
    columns |= {"USD per hour": MEMORY_AND_COST["USD per hour"]}
    runs = rungs[rungs["verdict"] == ""]
    made = [
        _table(f"{kind} · {name}", "", ladder, columns, n_words=1)
        for (kind, name), ladder in runs.groupby(["kind", "name"], sort=False)
    ]
    return [table for table in (*made, _pairs(runs), _stopped(rungs)) if table.rows]


def _table(title: str, remark: str, rows: Frame, columns: Columns, n_words: int = 2) -> Table:
    body = [[write(row) for write in columns.values()] for row in rows.to_dict("records")]
    return Table(title, remark, list(columns), body, n_words)


def _speed(runs: Frame, kind: str) -> Table:
    remark = "Step time is the median; efficiency is relative to the smallest rung of the same curve."
    if kind == "forecast":
        remark += " The range is the forecast's interval, where it has one."
    notes = {re.sub(r"\d+", "", note): f"{note}." for note in runs["note"] if note}  # a ladder's differ in their counts
    return _table(f"Speed, {kind}", " ".join([remark, *notes.values()]), runs, RUNG | SPEED)


def _money(rungs: Frame, kind: str, tokens: float | None) -> Table:
    known = rungs[rungs[["memory_bytes", "usd_per_h"]].notna().any(axis=1)]
    remark = "Memory is per device; GB are 10⁹ bytes."
    if tokens:
        remark += f" A run is {words.amount(tokens)} tokens."
    reasons = list(dict.fromkeys(filter(None, rungs[rungs["verdict"] == ""]["why_not"])))
    if reasons:
        remark += f" No price where: {'; '.join(reasons)}."
    return _table(f"Memory and cost, {kind}", remark, known, RUNG | MEMORY_AND_COST | (RUN if tokens else {}))


def _whole_runs(runs: Frame, kind: str, tokens: float) -> list[Table]:
    """Runs with failures: how long and how much, and where the time goes that is not training."""

    def part(name: str) -> Callable[[dict[str, Any]], str]:
        return lambda r: words.percent(r["run_shares"].get(name))

    known = runs[runs["run_goodput"].notna()]
    lost = {name.replace("_", " "): part(name) for name in _keys(known["run_shares"]) if name != "goodput"}
    remark = (
        f"A run of {words.amount(tokens)} tokens, in closed form; the range is of simulated ones. USD are at the "
        "median price, spare nodes among them."
    )
    reasons = list(dict.fromkeys(filter(None, runs[runs["run_goodput"].isna()]["run_why_not"])))
    if reasons:
        remark += f" Not said where: {'; '.join(reasons)}."
    shares = "Goodput is the fraction of the time that moves the run on; with the last columns it adds up to 100 %."
    return [
        _table(f"Whole runs with failures, {kind}", remark, known, RUNG | WHOLE_RUN),
        _table(f"Where the time of a whole run goes, {kind}", shares, known, RUNG | CHECKPOINTS | lost),
    ]


def _pairs(runs: Frame) -> Table:
    columns = RUNG | {
        "Measured step": lambda r: words.seconds(r["step_s"]),
        "Forecast step": lambda r: words.seconds(r["step_s_forecast"]),
        "Forecast's error": lambda r: words.signed_percent(r["error"]),
    }
    remark = "Rungs that were both measured and forecast; the error is forecast over measured step time, less one."
    return _table("Forecast against measurement", remark, pairs(runs), columns)


def _stopped(rungs: Frame) -> Table:
    columns = {"Kind": lambda r: r["kind"], "Ladder": RUNG["Ladder"], "Layout": RUNG["Layout"]}
    columns |= {"Reason": lambda r: r["verdict"], "Devices": RUNG["Devices"]}
    remark = "Rungs that failed, or that do not fit into memory; they are on no curve."
    return _table("Rungs that do not run", remark, rungs[rungs["verdict"] != ""], columns, n_words=4)


def _breakdown(runs: Frame) -> Table:
    known = runs[runs["breakdown_s"].astype(bool)]

    def part(column: str, name: str) -> Callable[[dict[str, Any]], str]:
        return lambda r: words.seconds(r[column].get(name))

    columns = RUNG | {"Step": SPEED["Step"]}
    columns |= {name.replace("_", " "): part("breakdown_s", name) for name in _keys(known["breakdown_s"])}
    columns |= {f"hidden: {name.replace('_', ' ')}": part("hidden_s", name) for name in _keys(known["hidden_s"])}
    remark = "Parts add up to the step. Hidden communication runs behind compute and is not added."
    return _table("Where the step goes, forecast", remark, known, columns)


def _provenance(records: Sequence[Record]) -> Table:
    """One row per way of making records: those that differ only in rung and time share one."""
    groups: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for record in records:
        groups[_made_by(record)].append(record)
    columns = ["Kind", "Made by", "Commit", "Versions", "Command", "Created", "Records"]
    rows = []
    for made_by, group in groups.items():
        created = sorted(str(record.get("created") or "") for record in group)
        when = created[0] if created[0] == created[-1] else f"{created[0]} to {created[-1]}"
        rows.append([*made_by, when or words.DASH, str(len(group))])
    return Table("Provenance", "How each record came to be.", columns, rows, n_words=6)


def _made_by(record: Record) -> tuple[str, ...]:
    if record["kind"] == "forecast":
        made = f"{record.get('method') or 'method not said'}, compiled for {record.get('compiled_for') or 'nothing'}"
    else:
        made = f"run on {record.get('device_kind') or record['device']}"
    told = (record["kind"], made, *(_plain(record.get(key)) for key in ("commit", "versions", "command")))
    return tuple(text or words.DASH for text in told)


def _facts(records: Sequence[Record]) -> Table:
    found = {(r["device"], *fact): None for r in records for fact in _leaves(r.get("facts") or {})}
    remark = "What the forecasts rest on."
    return Table("Facts", remark, ["Device", "Fact", "Value", "Source"], [list(row) for row in found], n_words=4)


def _assumed(records: Sequence[Record]) -> Table:
    """What no source gives. Where rungs differ in a value all are said if they are few; the records have them."""
    found: dict[tuple[str, str], dict[Any, None]] = defaultdict(dict)
    for record in records:
        for name, value, _ in _leaves(record.get("assumed") or {}):
            found[record["device"], name][value] = None
    rows = [[*key, "; ".join(values) if len(values) < 4 else f"{len(values)} values"] for key, values in found.items()]
    return Table(
        "Assumed",
        "What the forecasts take for granted; records.csv has every value.",
        ["Device", "Name", "Value"],
        rows,
        n_words=3,
    )


def _run_facts(runs: Frame) -> Table:
    found = {
        (row["device"], fact["name"], f"{fact['value']:.6g}", fact["source"]): None
        for row in runs.to_dict("records")
        for fact in row["run_rests_on"]
    }
    columns = ["Device", "Fact", "Value", "Source"]
    return Table("Failures", "What whole runs rest on.", columns, [list(row) for row in found], n_words=4)


def _prices(rungs: Frame) -> Table:
    sources = {(row["device"], source): None for row in rungs.to_dict("records") for source in row["price_sources"]}
    return Table("Prices", "Where the prices come from.", ["Device", "Source"], [list(row) for row in sources], 2)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Every fact under `value` as (name, value, source); a fact is a scalar, or an object with a `value`."""
    if isinstance(value, Mapping) and "value" in value:
        told = [_plain(v) if k in ("source", "date") else f"{k} {_plain(v)}" for k, v in value.items() if k != "value"]
        yield path, _plain(value["value"]), ", ".join(told)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif value is not None:
        yield path, _plain(value), ""


def _plain(value: Any) -> str:
    """Any JSON value on one line, without its brackets."""
    if isinstance(value, Mapping):
        return "; ".join(f"{k} {_plain(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def _keys(column: Frame) -> list[str]:
    return list(dict.fromkeys(name for parts in column for name in parts))
