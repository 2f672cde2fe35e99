"""Forecast published training runs, each as its framework runs it, and compare.

    python -m experiments.validate --table=runs.csv --table=more.csv --out=runs/validation

A table has one run a row, in the columns that docs/validation.md lists. What a source does not print is taken as the
framework would, and listed under `assumed`. With --fast two thousand rows take under a minute on one core. Without it
our own program is compiled and simulated at the layout of each row that it can express, which takes hours: what is done
is kept in --out, and the same command goes on. With the tables of five sources or more and --fast,
`--interval_to=experiments/published/intervals.json` makes the ranges anew that every forecast carries.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments import attached, entry, records, show
from experiments.entry import flag
from experiments.forecast import interval
from experiments.forecast.closed_form.setup import Setup
from experiments.forecast.closed_form.step import ClosedForm, Forecast
from experiments.hardware import Device, load
from experiments.records import layout_text
from experiments.validation import backtest, plots, report, score, simulated
from experiments.validation.conventions import flops_per_token
from experiments.validation.fitted import fitted
from experiments.validation.models import Excused
from experiments.validation.rows import Case, case_of, measured_step_s
from experiments.validation.tables import Row, read
from transformer.accounting import model_flops_per_token
from transformer.errors import RequestError

ROWS, SCORES, LINES, TABLES, PAGE = "rows.jsonl", "scores.json", "rows.csv", "tables.md", "report.html"


@dataclass(frozen=True, kw_only=True)
class ValidateRequest:
    """`python -m experiments.validate`"""

    table: tuple[str, ...] = flag((), "CSV files of published runs; may be given several times, or with commas between")
    out: str = flag("runs/validation", f"the folder for {ROWS}, {LINES}, {TABLES}, {SCORES} and {PAGE}")
    fast: bool = flag(False, "the closed form alone, without compiling anything")
    simulate: int | None = flag(
        None, "rows to compile and simulate in this run, all sources in turn; default: all left"
    )
    processes: int | None = flag(None, "how many rows are compiled at once; default: one a core")
    interval_to: str | None = flag(None, "a JSON file for the ranges that these rows give, which their own then are")
    facts: str | None = flag(None, "a TOML file that adds to or overrides hardware facts")
    json: bool = flag(False, "print the scores as JSON on standard output, all else on standard error")

    def __post_init__(self) -> None:
        if not self.table:
            raise RequestError("--table is missing: expected a CSV file of published runs, such as --table=runs.csv")
        for name in ("simulate", "processes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"--{name}={value}: expected at least 1; nothing is compiled with --fast")
            if value is not None and self.fast:
                raise RequestError(f"--{name}={value}: nothing is compiled with --fast; leave out one of them")
        if self.interval_to and not self.fast:
            raise RequestError(f"--interval_to={self.interval_to}: ranges are of the closed form; give --fast too")


def main(request: ValidateRequest) -> int:
    out = Path(request.out)
    records.check_out(out)
    facts = load(request.facts)
    rows = [row for path in request.table for row in read(path)]
    models: dict[Device, ClosedForm] = {}
    pairs = [_result(row, facts, models) for row in rows]
    done, is_whole = [row for row, _ in pairs], True
    if not request.fast:
        is_whole = _simulate(request, out, pairs, models)
    ranges = _ranges(request, done)
    done = [row if row["step_s"] is None else row | backtest.ranged(row, ranges) for row in done]
    summary = summarise(done) | {"interval": backtest.summary(done, ranges), "fitted": fitted(ranges)}
    _write(out, done, summary)
    if request.json:
        print(json.dumps(summary))
    _show(summary)
    return 0 if is_whole else 1


def _simulate(
    request: ValidateRequest,
    out: Path,
    pairs: Sequence[tuple[score.Scored, tuple[Setup, Device] | None]],
    models: dict[Device, ClosedForm],
) -> bool:
    """Simulate what rows are not yet, and tell each row of it. False: it was interrupted."""
    attached.hide_all()
    tasks: list[tuple[score.Scored, simulated.Task]] = []
    for row, chosen in pairs:
        if chosen is None:
            continue
        try:
            tasks.append((row, simulated.task_of(*chosen)))
        except simulated.NotExpressed as error:
            row["not_simulated"] = str(error)
    known = simulated.kept(out)
    new: dict[str, tuple[score.Scored, simulated.Task]] = {}
    for row, task in tasks:
        if task.key not in known:
            new.setdefault(task.key, (row, task))
    in_turn = simulated.in_turn(list(new.values()), lambda pair: pair[0]["source_id"])
    left = [task for _, task in in_turn][: request.simulate]
    is_whole, processes = True, request.processes or os.cpu_count() or 1
    with contextlib.closing(simulated.simulate(left, out, processes)) as found:
        try:
            for n, record in enumerate(found, start=1):
                known[record["key"]] = record
                show.remark(f"{n:,} of {len(left):,}: {record['failed'] or layout_text(record['layout'])}")
        except KeyboardInterrupt:
            is_whole = False
            show.remark("stopped: what is done is kept, the same command goes on")
    for row, task in tasks:
        record = known.get(task.key)
        row |= (
            {"not_simulated": "not yet"} if record is None else simulated.beside(row, task, record, models[task.device])
        )
    return is_whole


def _ranges(request: ValidateRequest, done: Sequence[score.Scored]) -> interval.Backtests:
    """Those that ship, or made anew from the rows that are compared."""
    if not request.interval_to:
        return interval.published()
    tables = " ".join(f"--table={Path(path).name}" for path in request.table)
    command = f"python -m experiments.validate --fast --interval_to={Path(request.interval_to).name} {tables}"
    found = backtest.backtests(backtest.runs_of(done), command)
    interval.write(Path(request.interval_to), found)
    return found


def _result(row: Row, facts: Any, models: dict[Device, ClosedForm]) -> tuple[score.Scored, tuple[Setup, Device] | None]:
    """What is written of a row: forecast and compared, or the reason that it is not; and what was forecast."""
    printed: dict[str, Any] = {
        "source_id": row.text("source_id"), "place": row.place, "model_name": row.text("model_name"),
        "device": row.text("device"), "n_devices": row.count("n_devices"), "seq_len": row.count("seq_len"),
        "precision": row.text("precision"), "quality": _quality(row),
    }  # fmt: skip
    try:
        case = case_of(row, facts)
        model = models.setdefault(case.device, ClosedForm(case.device))
        setup, forecast = case.forecast(model)
    except (Excused, RequestError) as error:
        if isinstance(error, RequestError) and row.place in str(error):
            raise  # a cell that is malformed is the table's fault
        return printed | {"step_s": None, "excused": " ".join(str(error).split())}, None
    return printed | _compared(row, case, setup, forecast), (setup, case.device)


def _compared(row: Row, case: Case, setup: Setup, forecast: Forecast) -> dict[str, Any]:
    n, tokens = setup.layout.n_devices, setup.global_batch_seqs * (row.count("seq_len") or 0)
    peak = case.device.compute_peak(setup.precision) or case.device.compute_peak("bf16")
    length = row.count("seq_len") or setup.seq_len

    def flops(said: str) -> float:
        whole = row.count("global_batch_seqs") or setup.global_batch_seqs
        return flops_per_token(setup.model, setup.seq_len, said) * whole * length

    measured, by = measured_step_s(row, flops, peak)
    scale = (row.count("global_batch_seqs") or setup.global_batch_seqs) / setup.global_batch_seqs  # if it was rounded
    step_s, tokens = scale * forecast.step_s, scale * tokens
    model_flops = model_flops_per_token(setup.model, setup.seq_len)
    memory_gb = row.number("memory_gb")
    total = forecast.total_bytes
    limit = case.device.usable_bytes
    layered = setup.layout.context > 1 or bool(setup.model.n_experts)
    standing = interval.Standing(case.device.slug, setup.practice.name, n, layered)
    return {
        "method": "closed_form", "step_s": step_s, "closed_form_s": step_s,
        "measured_step_s": measured, "measured_by": by,
        "error": step_s / measured - 1 if measured else None,
        "closed_form_error": step_s / measured - 1 if measured else None,
        "tokens": tokens, "tokens_per_s": tokens / step_s, "tokens_per_s_per_device": tokens / step_s / n,
        "mfu": model_flops * tokens / step_s / n / peak if peak else None,
        "memory_gb": total / 1e9, "measured_memory_gb": memory_gb,
        "memory_error": total / 1e9 / memory_gb - 1 if memory_gb else None,
        "fits": limit is None or total <= limit,
        "layout": str(setup.layout), "global_batch_seqs": setup.global_batch_seqs, "batch_scale": scale,
        "micro_batch": setup.micro_batch_seqs, "microbatches": setup.microbatches, "remat": setup.remat,
        "practice": setup.practice.name, "standing": dataclasses.asdict(standing), "assumed": list(case.assumed),
        "breakdown_s": {k: scale * v for k, v in forecast.breakdown_s.items()}, "hidden_s": forecast.hidden_s,
        "memory_bytes": forecast.memory_bytes,
    }  # fmt: skip


def _quality(row: Row) -> str:
    """A: printed in full; B: a needed column inferred; C: parts of it unknown, as the row itself says."""
    notes = row.text("notes").upper()
    if "LOW DETAIL" in notes or not (row.text("global_batch_seqs") and row.text("layers")):
        return "C"
    return "B" if not row.text("micro_batch") or "DIGITISED" in row.text("inferred_cols").upper() else "A"


def summarise(done: Sequence[score.Scored]) -> dict[str, Any]:
    """All scores, and what is excused."""
    ranked = score.ranks(done)
    correlations = [r["spearman"] for r in ranked if r["spearman"] is not None]
    regrets = [r["regret_pct"] for r in ranked if r["regret_pct"] is not None]
    return {
        **score.scores(done),
        "method": "simulated" if any(row.get("method") == "simulated" for row in done) else "closed_form",
        "spearman_median": round(sorted(correlations)[len(correlations) // 2], 3) if correlations else None,
        "regret_pct": round(sum(regrets) / len(regrets), 3) if regrets else None,
        "by_source": score.by(done, "source_id"),
        "by_device": score.by(done, "device"),
        "by_scale": score.by(done, "scale", score.scale_of),
        "by_quality": score.by(done, "quality"),
        "by_practice": score.by([r for r in done if r["step_s"] is not None], "practice"),
        "by_model": ranked,
        "excused": [
            {"place": r["place"], "model_name": r["model_name"], "reason": r["excused"]}
            for r in done if r.get("excused")
        ],
        "not_simulated": _reasons(done),
    }  # fmt: skip


def _reasons(done: Sequence[score.Scored]) -> list[dict[str, Any]]:
    """Why rows are forecast in closed form alone, with a row of each reason; the most common first."""
    rows: dict[str, list[score.Scored]] = {}
    for row in done:
        if reason := row.get("not_simulated"):
            rows.setdefault(reason, []).append(row)
    ranked = sorted(rows.items(), key=lambda pair: -len(pair[1]))
    return [{"reason": reason, "rows": len(of), "first": of[0]["place"]} for reason, of in ranked]


def _write(out: Path, done: Sequence[score.Scored], summary: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / ROWS).write_text("".join(json.dumps(row) + "\n" for row in done), encoding="utf-8")
    (out / LINES).write_text(report.lines(done), encoding="utf-8")
    (out / TABLES).write_text(report.markdown(summary), encoding="utf-8")
    records.write_whole(out / PAGE, plots.page(done, summary))
    (out / SCORES).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def _show(summary: dict[str, Any]) -> None:
    columns = {
        "rows": "rows", "forecast": "forecast", "mape_pct": "MAPE %", "bias_pct": "bias %", "median_pct": "median %",
        "worst_pct": "worst %", "memory_mape_pct": "memory %", "fits_pct": "fits %", "held_pct": "held %",
    }  # fmt: skip
    if summary.get("simulated"):
        columns |= {"simulated": "simulated", **report.BOTH}
    table = Table("source", *columns.values())
    for one in [*summary["by_source"], {"source_id": "all"} | summary]:
        table.add_row(one["source_id"], *("" if (v := one.get(k)) is None else f"{v:,.4g}" for k in columns))
    console = Console(stderr=True)
    if not console.is_terminal:
        console = Console(
            stderr=True, width=200 if summary.get("simulated") else 140
        )  # a pipe has no width, and 80 would fold the sources
    console.print(table)
    lines = (*report.methods(summary), *report.ranges(summary["interval"]), *report.fits(summary["fitted"]))
    console.print(*lines, sep="\n", highlight=False)
    for one in summary["excused"]:
        console.print(f"not forecast: {one['place']}, {one['model_name']}: {one['reason']}", highlight=False)


if __name__ == "__main__":
    entry.start(main, ValidateRequest)
