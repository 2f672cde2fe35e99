"""The top of the report, for someone who signs bills: what was asked, and the largest rungs in a few numbers."""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from experiments.report import words
from experiments.report.curves import Frame, pairs

MOST_CARDS = 6


@dataclass(frozen=True)
class Card:
    """The largest rung that runs of one kind, preset and device; `numbers` are (label, value, remark)."""

    kind: str
    title: str
    subtitle: str
    numbers: list[tuple[str, str, str]]


def title(rungs: Frame) -> str:
    """'llama3-70b, 64 to 40,960 devices'."""
    presets = list(rungs["preset"].unique())
    names = " and ".join(presets) if len(presets) < 3 else words.plural(len(presets), "model")
    return f"{names}, {_span(rungs['n_devices'])}"


def sentences(rungs: Frame, tokens: float | None) -> list[str]:
    """What was asked and what came of it."""
    told = []
    for (kind, preset, device), group in rungs.groupby(["kind", "preset", "device"], sort=False):
        verb = "measured on" if kind == "measured" else "forecast for"
        scaling = " and ".join(f"{s} scaling" for s in group["scaling"].unique())
        lengths = " and ".join(words.count(n) for n in group["seq_len"].unique())
        rungs_text = words.plural(len(group), "rung")
        span = _span(group["n_devices"])
        told.append(f"{preset}: {rungs_text} {verb} {device}, {span}, {scaling}, sequences of {lengths} tokens.")
    if tokens:
        told.append(f"A run is {words.amount(tokens)} tokens.")
    stopped = int((rungs["verdict"] != "").sum())
    if stopped:
        told.append(f"{words.plural(stopped, 'rung')} failed or did not fit; the reasons are listed below.")
    both = pairs(rungs[rungs["verdict"] == ""])
    if not both.empty:
        middle = words.percent(both["error"].abs().median())
        told.append(
            f"Where a rung was also measured, the forecast's step time is off by {middle} (median of {len(both)})."
        )
    return told


def cards(rungs: Frame, tokens: float | None) -> list[Card]:
    """The largest rungs, furthest first, at most six."""
    runs = rungs[(rungs["verdict"] == "") & rungs["step_s"].notna()]
    runs = runs.sort_values(["n_devices", "tokens_per_s"], ascending=False, kind="stable")
    largest = runs.drop_duplicates(["kind", "preset", "device"]).head(MOST_CARDS)
    return [_card(row, tokens) for row in largest.to_dict("records")]


def _card(row: dict[str, Any], tokens: float | None) -> Card:
    span = words.span(words.seconds, row["step_low_s"], row["step_high_s"])
    base = words.plural(int(row["base_devices"]), "device")
    per_mtok = f"{words.usd(row['usd_per_mtok'])} per million tokens" if pd.notna(row["usd_per_mtok"]) else ""
    numbers = [
        ("Step time", words.seconds(row["step_s"]), span.strip(words.DASH)),
        (
            "Tokens per day",
            words.amount(row["tokens_per_s"] * 86_400),
            f"{words.percent(row['efficiency'])} efficiency against {base}",
        ),
        ("MFU", words.percent(row["mfu_full"]), f"{words.percent(row['mfu_causal'])} with attention counted causal"),
        (
            "USD per hour",
            words.usd(row["usd_per_h"]) if pd.notna(row["usd_per_h"]) else "no price",
            per_mtok or row["why_not"],
        ),
        ("Memory", words.memory(row["memory_bytes"]), _fits(row)),
    ]
    if tokens:
        numbers.insert(4, ("USD per run", words.usd(row["run_usd"]), f"takes {words.days(row['run_days'])}"))
        failing = f"takes {words.days(row['run_days_with_failures'])}, goodput {words.percent(row['run_goodput'])}"
        numbers.insert(5, ("USD with failures", words.usd(row["run_usd_with_failures"]), failing))
    subtitle = f"{row['name']} · {row['layout']}"
    numbers = [number for number in numbers if number[1] != words.DASH]
    return Card(row["kind"], f"{words.count(row['n_devices'])} {words.TIMES} {row['device']}", subtitle, numbers)


def _fits(row: dict[str, Any]) -> str:
    if row["fits"] is None or not row["limit_bytes"] > 0:  # NaN where the device has no facts
        return "limit not known"
    return f"fits into {words.memory(row['limit_bytes'])}"


def _span(n_devices: Frame) -> str:
    smallest, largest = n_devices.min(), n_devices.max()
    if smallest == largest:
        return words.plural(int(largest), "device")
    return f"{words.count(smallest)} to {words.count(largest)} devices"
