"""Ranges from back-tests: how far rows lie from their forecasts, each held against what the other sources say.

A source weighs as the square root of its rows: rows of one source share its machine and its software, so a thousand of
them know less than ten times a hundred. Few groups, by device count and by distance from what is measured; a group with
too few sources is taken with all device counts of its distance, and no range is narrower than one nearer by.
"""

import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np

from experiments.forecast.interval import FARTHEST, HELD, SCALES, Backtests, Ground, Standing, Width, far
from experiments.validation.score import Scored
from transformer.errors import RequestError

NEEDED_SOURCES = 5  # of a group, or it is taken with others
LEVELS = tuple(round(0.7 + 0.01 * n, 2) for n in range(26))
"""Quantiles, of which the one is taken that holds 80 % of what is left out: the only number fitted here."""


class Run(NamedTuple):
    """A run. miss: the larger of measured / forecast and forecast / measured, less 1."""

    source: str
    standing: Standing
    miss: float


class Group(NamedTuple):
    """Misses in rising order, the part of all weight up to each, and how many rows and sources they are of."""

    misses: np.ndarray
    weight: np.ndarray
    rows: int
    sources: int

    def quantile(self, level: float) -> Width:
        at = min(int(np.searchsorted(self.weight, level - 1e-9)), len(self.misses) - 1)
        return Width(float(self.misses[at]), self.rows, self.sources)


Groups = dict[tuple[int, int], Group | None]  # by scale and distance


def runs_of(done: Sequence[Scored]) -> list[Run]:
    """Of the rows that are forecast and measured."""
    return [
        Run(row["source_id"], Standing(**row["standing"]), max(1 + row["error"], 1 / (1 + row["error"])) - 1)
        for row in done
        if row.get("error") is not None
    ]


def backtests(runs: Sequence[Run], command: str) -> Backtests:
    """Half-widths of all groups, for every source left out and for none. RequestError with too few sources."""
    sources = sorted({run.source for run in runs})
    if len(sources) < NEEDED_SOURCES:
        raise RequestError(
            f"--interval_to: the rows that can be compared are of {len(sources)} sources, expected {NEEDED_SOURCES} or "
            "more, for each is left out in turn"
        )
    ground: dict[tuple[str, str], frozenset[str]] = {}
    for source, standing, _ in runs:
        key = standing.device, standing.practice
        ground[key] = ground.get(key, frozenset()) | {source}
    groups = {
        left_out: _groups([run for run in runs if run.source != left_out], ground, left_out)
        for left_out in ["", *sources]
    }
    made = {"created": datetime.now(UTC).strftime("%Y-%m-%d"), "command": command, "method": "closed_form"}
    made |= {"rows": len(runs), "sources": len(sources)}
    found = [
        Backtests(
            ground=ground, made=made | {"quantile": level}, widths={
                (left_out, *at): width for left_out in groups for at, width in _widths(groups[left_out], level).items()
            },
        )
        for level in LEVELS
    ]  # fmt: skip
    held = [_held(runs, one) for one in found]
    best = min(range(len(LEVELS)), key=lambda n: abs(held[n] - HELD))
    return found[best]


def _held(runs: Sequence[Run], found: Backtests) -> float:
    """Of left-out runs, each source weighing as in the quantile."""
    limits = {key: found.range_of(key[1], key[0]).half_width for key in {run[:2] for run in runs}}
    weight = _weights(runs)
    return float(np.dot(weight, [run.miss <= limits[run[:2]] for run in runs]) / weight.sum())


def _weights(runs: Sequence[Run]) -> np.ndarray:
    """sqrt(n) of a source, shared by its n rows."""
    _, of, counts = np.unique([run.source for run in runs], return_inverse=True, return_counts=True)
    return 1 / np.sqrt(counts[of])


def _groups(runs: Sequence[Run], ground: Ground, left_out: str) -> Groups:
    """What each range rests on; a run's own source, and the one left out, are no ground to it."""
    at = [(run.standing.scale, far(run.standing, ground, {run.source, left_out})[0]) for run in runs]
    found: Groups = {}
    for distance in range(FARTHEST + 1):
        everywhere = [run for run, (_, d) in zip(runs, at, strict=True) if d == distance]
        for scale in range(len(SCALES)):
            here = [run for run, where in zip(runs, at, strict=True) if where == (scale, distance)]
            enough = len({run.source for run in here}) >= NEEDED_SOURCES
            found[scale, distance] = _group(here if enough else everywhere)
    return found


def _group(runs: Sequence[Run]) -> Group | None:
    if not runs:
        return None
    runs = sorted(runs, key=lambda run: run.miss)
    weight = np.cumsum(_weights(runs))
    return Group(
        np.array([run.miss for run in runs]), weight / weight[-1], len(runs), len({run.source for run in runs})
    )


def _widths(groups: Groups, level: float) -> dict[tuple[int, int], Width]:
    found: dict[tuple[int, int], Width] = {}
    for scale in range(len(SCALES)):
        widest = Width(0.0, 0, 0)
        for distance in range(FARTHEST + 1):
            group = groups[scale, distance]
            own = group.quantile(level) if group else widest
            widest = own._replace(half_width=max(own.half_width, widest.half_width))
            found[scale, distance] = widest
    return found


def ranged(row: Scored, found: Backtests) -> dict[str, Any]:
    """What a row that is forecast is given: its range, in seconds, and whether that holds what was measured."""
    near = found.range_of(Standing(**row["standing"]), row["source_id"])
    ends = near.around(row["step_s"])
    measured = row["measured_step_s"]
    return {
        "low_s": ends["low"], "high_s": ends["high"], "half_width": near.half_width, "distance": near.distance,
        "held": ends["low"] <= measured <= ends["high"] if measured else None, "range_rests_on": near.reason,
    }  # fmt: skip


def summary(done: Sequence[Scored], found: Backtests) -> dict[str, Any]:
    """How the ranges did: over rows, without the largest source, as the mean over sources, and by distance."""
    tested = [row for row in done if row.get("held") is not None]
    by_source: dict[str, list[bool]] = {}
    for row in tested:
        by_source.setdefault(row["source_id"], []).append(row["held"])
    counts = {source: len(held) for source, held in by_source.items()}
    largest = max(counts, key=lambda source: counts[source], default="")
    others = [row["held"] for row in tested if row["source_id"] != largest]
    return {
        "made": dict(found.made),
        "held_pct": _pct([row["held"] for row in tested]),
        "held_pct_without_largest": _pct(others), "largest": largest,
        "held_pct_mean_of_sources": _pct([statistics.fmean(held) for held in by_source.values()]),
        "median_half_width_pct": round(100 * statistics.median(r["half_width"] for r in tested), 1) if tested else None,
        "not_left_out": sorted(set(by_source) - found.sources),
        "by_distance": [
            {"distance": d, "rows": len(near), "held_pct": _pct([row["held"] for row in near])}
            for d in range(FARTHEST + 1)
            if (near := [row for row in tested if row["distance"] == d])
        ],
    }  # fmt: skip


def _pct(parts: Sequence[float]) -> float | None:
    return round(100 * statistics.fmean(parts), 1) if parts else None
