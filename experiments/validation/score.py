"""Errors of forecasts, by whatever the rows share."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

Scored = dict[str, Any]
"""A row's result as it is written: what it is of, `step_s`, `measured_step_s`, `error` ..."""


def scores(rows: Sequence[Scored]) -> dict[str, Any]:
    """Over rows: how many, how many forecast, and of those with something measured the errors of step time, in percent.

    bias: the mean error; mape: the mean of its size; worst: the one of greatest size, with its sign.
    """
    done = [r for r in rows if r.get("step_s") is not None]
    errors = [100 * r["error"] for r in done if r.get("error") is not None]
    memory = [100 * r["memory_error"] for r in done if r.get("memory_error") is not None]
    found: dict[str, Any] = {"rows": len(rows), "forecast": len(done), "compared": len(errors)}
    found |= _errors(errors, "") | ({"memory_rows": len(memory)} | _errors(memory, "memory_") if memory else {})
    held = [r["held"] for r in done if r.get("held") is not None]
    found["held_pct"] = round(100 * statistics.fmean(held), 1) if held else None  # by their ranges
    found["fits_pct"] = round(100 * statistics.fmean(r["fits"] for r in done), 1) if done else None
    return found | _simulated([r for r in done if r.get("simulated_s") is not None])


def _simulated(rows: Sequence[Scored]) -> dict[str, Any]:
    """Of rows that are simulated: `simulated`, how many, and `simulated_fits`, how many of our programs fit. Of those
    that do and were measured: errors of the headline (`simulated_`), of the closed form (`closed_form_`), and of our
    own program taken for the framework's (`simulated_ours_`). `ours_`: our closed form over our simulated schedule, of
    those that fit, less 1: the median of its size and with its sign, and the size that 90 % stay below, in percent.
    Nothing of no rows."""
    if not rows:
        return {}
    fit = [r for r in rows if r["simulated_ours_fits"]]
    found: dict[str, Any] = {"simulated": len(rows), "simulated_fits": len(fit)}
    for name in ("simulated", "closed_form", "simulated_ours"):
        found |= _errors([100 * r[f"{name}_error"] for r in fit if r[f"{name}_error"] is not None], f"{name}_")
    off = [100 * (r["ours_ratio"] - 1) for r in fit]
    found |= {"ours_median_pct": None, "ours_bias_pct": None, "ours_90_pct": None}
    if off:
        sizes = sorted(map(abs, off))
        found["ours_median_pct"] = round(statistics.median(sizes), 3)
        found["ours_bias_pct"] = round(statistics.median(off), 3)
        found["ours_90_pct"] = round(sizes[math.ceil(0.9 * len(sizes)) - 1], 3)
    return found


def _errors(errors: Sequence[float], prefix: str) -> dict[str, float | None]:
    if not errors:
        return {f"{prefix}{name}_pct": None for name in ("mape", "bias", "median", "worst")}
    return {
        f"{prefix}mape_pct": round(statistics.fmean(map(abs, errors)), 3),
        f"{prefix}bias_pct": round(statistics.fmean(errors), 3),
        f"{prefix}median_pct": round(statistics.median(map(abs, errors)), 3),
        f"{prefix}worst_pct": round(max(errors, key=abs), 3),
    }


def by(rows: Sequence[Scored], name: str, of: Callable[[Scored], Any] | None = None) -> list[dict[str, Any]]:
    """Scores of the rows that share a value, in the order of the table."""
    groups: dict[Any, list[Scored]] = {}
    for row in rows:
        groups.setdefault(of(row) if of else row[name], []).append(row)
    return [{name: value} | scores(group) for value, group in groups.items()]


def scale_of(row: Scored) -> str:
    """A row's device count, to the power of eight that it is below."""
    n = row["n_devices"] or 1
    top = 8 ** max(1, math.ceil(math.log(n, 8) - 1e-9))
    return f"{top // 8 + 1 if top > 8 else 1} to {top:,}"


def ranks(rows: Sequence[Scored]) -> list[dict[str, Any]]:
    """Of each model, source and device with at least three rows: does the forecast order their throughput as measured?

    spearman: rank correlation of tokens/s a device. regret: what the layout that the forecast puts first loses against
    the best one, in percent; of rows of one device count and batch only, of which a planner would choose.
    """
    groups: dict[Any, list[Scored]] = {}
    for row in rows:
        if row.get("error") is not None:
            key = (row["source_id"], row["model_name"], row["device"], row["seq_len"], row["precision"])
            groups.setdefault(key, []).append(row)
    found = []
    for (source, model, device, length, precision), group in groups.items():
        if len(group) < 3 or len({r["measured_step_s"] / r["tokens"] * r["n_devices"] for r in group}) < 2:
            continue
        theirs = [r["tokens"] / r["measured_step_s"] / r["n_devices"] for r in group]
        ours = [r["tokens"] / r["step_s"] / r["n_devices"] for r in group]
        found.append(
            {"source_id": source, "model_name": model, "device": device, "seq_len": length, "precision": precision,
             "rows": len(group), "spearman": spearman(theirs, ours), "regret_pct": _regret(group)}
        )  # fmt: skip
    return found


def _regret(group: Sequence[Scored]) -> float | None:
    """The mean over sets of rows between which a planner could choose."""
    sets: dict[Any, list[Scored]] = {}
    for row in group:
        sets.setdefault((row["n_devices"], row["global_batch_seqs"]), []).append(row)
    losses = []
    for rows in sets.values():
        if len({str(row["layout"]) + str(row["micro_batch"]) + row["remat"] for row in rows}) > 1:
            chosen, best = min(rows, key=lambda r: r["step_s"]), min(rows, key=lambda r: r["measured_step_s"])
            losses.append(100 * (chosen["measured_step_s"] / best["measured_step_s"] - 1))
    return round(statistics.fmean(losses), 3) if losses else None


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation, ties sharing their mean rank; None where one side is all ties.

    >>> spearman([1, 2, 3], [10, 20, 15])
    0.5
    """
    x, y = _ranked(a), _ranked(b)
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return round(statistics.correlation(x, y), 4)


def _ranked(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    return [(order.index(v) + len(order) - 1 - order[::-1].index(v)) / 2 for v in values]
