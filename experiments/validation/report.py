"""What validation writes for people: tables of errors by what rows share, and every row as a line of CSV."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.validation.score import Scored

HEADS = {
    "rows": "rows", "forecast": "forecast", "compared": "compared", "mape_pct": "MAPE %", "bias_pct": "bias %",
    "median_pct": "median %", "worst_pct": "worst %", "memory_rows": "with memory", "memory_mape_pct": "memory MAPE %",
    "fits_pct": "fits %", "held_pct": "in range %",
}  # fmt: skip
BOTH = {
    "simulated_mape_pct": "simulated MAPE %", "closed_form_mape_pct": "closed form's %",
    "simulated_ours_mape_pct": "our program's %", "ours_median_pct": "ours off %",
}  # fmt: skip
"""The two methods side by side, on the rows that are simulated."""
SIMULATED = {
    "simulated": "simulated", "simulated_fits": "fit", **BOTH, "simulated_bias_pct": "simulated bias %",
    "closed_form_bias_pct": "closed form's bias %", "simulated_median_pct": "simulated median %",
    "closed_form_median_pct": "closed form's median %", "simulated_worst_pct": "simulated worst %",
    "ours_bias_pct": "ours bias %", "ours_90_pct": "ours 90 %",
}  # fmt: skip
GROUPS = {
    "by_source": ("source_id", "source"), "by_device": ("device", "device"), "by_scale": ("scale", "devices"),
    "by_quality": ("quality", "quality"), "by_practice": ("practice", "run as"),
}  # fmt: skip
COLUMNS: tuple[str, ...] = (
    "source_id", "place", "model_name", "device", "n_devices", "seq_len", "precision", "practice", "layout",
    "global_batch_seqs", "micro_batch", "remat", "measured_by", "measured_step_s", "method", "step_s", "error", "low_s",
    "high_s", "distance", "held",
    "tokens_per_s_per_device", "mfu", "measured_memory_gb", "memory_gb", "fits", "assumed", "excused",
    "closed_form_s", "closed_form_error", "simulated_s", "simulated_error", "simulated_ours_s", "simulated_ours_error",
    "closed_form_ours_s", "ours_ratio", "simulated_ours_memory_gb", "simulated_ours_fits", "attention", "compile_s",
    "simulated_with", "not_simulated",
)  # fmt: skip


def markdown(summary: Mapping[str, Any]) -> str:
    """Every group's scores, ranks within models, and the rows that are excused."""
    whole = {"of": "all"} | dict(summary)
    parts = [_table([whole], "of", "", HEADS)]
    parts.append(
        "\n".join(f"- {line}" for line in (*methods(summary), *ranges(summary["interval"]), *fits(summary["fitted"])))
    )
    if summary.get("simulated"):
        some = [one for one in summary["by_source"] if one.get("simulated")]
        parts.append(_table([*({"of": one["source_id"]} | one for one in some), whole], "of", "source", SIMULATED))
    for key, (name, title) in GROUPS.items():
        parts.append(_table(summary[key], name, title, HEADS))
    ranked = [one for one in summary["by_model"] if one["spearman"] is not None]
    lines = ["| model | source | device | rows | Spearman | regret % |", "|---|---|---|---|---|---|"]
    for one in ranked:
        cells = (one["model_name"], one["source_id"], one["device"], one["rows"], one["spearman"], one["regret_pct"])
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    parts.append("\n".join(lines))
    parts.append("\n".join(f"- {one['place']}, {one['model_name']}: {one['reason']}" for one in summary["excused"]))
    parts.append(
        "\n".join(
            f"- not simulated, {one['rows']:,} rows, first {one['first']}: {one['reason']}"
            for one in summary["not_simulated"]
        )
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def methods(found: Mapping[str, Any]) -> list[str]:
    """The two methods against each other, a sentence each; nothing where nothing is simulated."""
    if not found.get("simulated"):
        return []
    lines = [
        f"{found['simulated']:,} rows are simulated too: our own program, compiled at their layouts; in "
        f"{found['simulated_fits']:,} it fits, and there the simulated schedule is the headline, carried over to the "
        "row's framework by the closed form"
    ]
    if found["simulated_mape_pct"] is not None:
        lines.append(
            f"of these the simulated forecast errs by {found['simulated_mape_pct']:.1f} %, the closed form by "
            f"{found['closed_form_mape_pct']:.1f} %; our program taken for the framework's by "
            f"{found['simulated_ours_mape_pct']:.1f} %"
        )
    if found["ours_median_pct"] is not None:
        lines.append(
            f"the closed form of our own program is {found['ours_median_pct']:.1f} % off its simulated schedule in the "
            f"median ({found['ours_bias_pct']:+.1f} % with its sign), nine of ten within {found['ours_90_pct']:.1f} %"
        )
    return lines


def ranges(found: Mapping[str, Any]) -> list[str]:
    """How the 80 % ranges did, a sentence each."""
    made = found["made"]
    lines = [
        f"ranges made {made['created']} from {made['rows']:,} rows of {made['sources']} sources, by the "
        f"{100 * made['quantile']:g} % quantile; a row's own source is left out"
    ]
    if found["held_pct"] is None:
        return lines
    lines.append(
        f"they hold {found['held_pct']:.1f} % of rows, in the mean of sources {found['held_pct_mean_of_sources']:.1f} %"
        + (
            f", without {found['largest']} {rest:.1f} %"
            if (rest := found["held_pct_without_largest"]) is not None
            else ""
        )
        + f"; median half-width {found['median_half_width_pct']:.1f} %"
    )
    lines.append(
        "by distance: "
        + ", ".join(
            f"{one['distance']}: {one['held_pct']:.1f} % of {one['rows']:,} rows" for one in found["by_distance"]
        )
    )
    if found["not_left_out"]:
        lines.append(f"sources that the ranges have not seen: {', '.join(found['not_left_out'])}")
    return lines


def fits(fitted: Mapping[str, Any]) -> list[str]:
    """How many numbers were fitted, and which."""
    return [
        f"{fitted['constants']} fitted constants, {fitted['on_tables']} of them on rows of such tables: "
        + ", ".join(f"{one['name']} ({one['value']:g})" for one in fitted["names"])
    ]


def _table(rows: Sequence[Mapping[str, Any]], name: str, title: str, columns: Mapping[str, str]) -> str:
    heads = [title, *columns.values()]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join([_cell(row[name]), *(_cell(row.get(key)) for key in columns)]) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def lines(done: Sequence[Scored]) -> str:
    """Every row, with the numbers that a reader compares."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", restval="", lineterminator="\n")
    writer.writeheader()
    for row in done:
        cells = {name: f"{v:.5g}" if isinstance(v, float) else v for name, v in row.items() if v is not None}
        writer.writerow(cells | {name: "; ".join(row.get(name, ())) for name in ("assumed", "simulated_with")})
    return text.getvalue()
