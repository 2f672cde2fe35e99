"""The page of a validation: every forecast against its measurement, and series of device counts."""

import html
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from experiments.report import page as report_page
from experiments.report import words
from experiments.report.figure import FAINT, PALETTE, Figure, View, device_axis, log_axis
from experiments.report.tables import Table
from experiments.validation.report import GROUPS, HEADS, SIMULATED, fits, methods, ranges
from experiments.validation.score import Scored

KEY = """<span class="tag measured">measured</span> as published by others: filled marks, solid lines.
<span class="tag forecast">forecast</span> of the same run, as its framework runs it: hollow marks, dashed lines.
None was measured here."""
SHAPES = ("circle", "square", "diamond", "triangle-up", "cross")
COLOURED: Mapping[str, Callable[[Scored], str]] = {
    "source": lambda row: row["source_id"],
    "device": lambda row: row["standing"]["device"],
    "software": lambda row: row["practice"],
}
LEAST = 3  # device counts that make a series
MOST_SERIES = 7


def page(done: Sequence[Scored], summary: Mapping[str, Any]) -> str:
    """The whole document, which needs no network."""
    told = [
        f"{summary['rows']:,} published runs, {summary['forecast']:,} of them forecast in closed form.",
        *(
            f"{line[0].upper()}{line[1:]}."
            for line in (*methods(summary), *ranges(summary["interval"]), *fits(summary["fitted"]))
        ),
    ]
    compared = [row for row in done if row.get("error") is not None]
    figures = [_scatter(compared), _ladders(compared)] if compared else []
    tables = [_table(summary[key], name, title, HEADS) for key, (name, title) in GROUPS.items()]
    if summary.get("simulated"):
        some = [one for one in summary["by_source"] if one.get("simulated")]
        tables.insert(0, _table(some, "source_id", "source, both methods", SIMULATED))
    return report_page.page("Forecast against published runs", told, [], [f for f in figures if f.views], tables, KEY)


def _scatter(rows: Sequence[Scored]) -> Figure:
    times = [row[key] for row in rows for key in ("step_s", "measured_step_s")]
    ends = [min(times) / 1.5, max(times) * 1.5]
    views = [
        View(f"by {name}", [*_diagonal(ends), *_clouds(rows, of)], "forecast step, s (log scale)")
        for name, of in COLOURED.items()
    ]
    axis = {"type": "log", "dtick": 1, "range": [math.log10(end) for end in ends]}
    layout = {
        "xaxis": axis | {"title": {"text": "measured step, s (log scale)"}},
        "yaxis": axis,
        "hovermode": "closest",
        "legend": {"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"},
    }
    caption = "One mark a run. On the line the forecast is right; below it is too fast. Dotted: 20 % off."
    return Figure("scatter", "Forecast and measured", caption, views, layout, "Coloured")


def _diagonal(ends: Sequence[float]) -> list[go.Scatter]:
    return [
        go.Scatter(
            x=list(ends), y=[factor * end for end in ends], mode="lines", hoverinfo="skip", showlegend=False,
            line={"color": FAINT, "width": 1, "dash": "solid" if factor == 1 else "dot"},
        )
        for factor in (1, 1.2, 1 / 1.2)
    ]  # fmt: skip


def _clouds(rows: Sequence[Scored], of: Callable[[Scored], str]) -> list[go.Scatter]:
    """A trace for each value, those with most rows first and so below the others."""
    found: dict[str, list[Scored]] = {}
    for row in rows:
        found.setdefault(of(row), []).append(row)
    return [
        go.Scatter(
            x=[row["measured_step_s"] for row in group], y=[row["step_s"] for row in group], mode="markers",
            name=f"{html.escape(name)} ({len(group):,})", hovertext=[_hover(row) for row in group],
            hoverinfo="text", marker=_marker(number) | {"size": 6, "opacity": 0.75},
        )
        for number, (name, group) in enumerate(sorted(found.items(), key=lambda pair: -len(pair[1])))
    ]  # fmt: skip


def _marker(number: int) -> dict[str, Any]:
    return {"color": PALETTE[number % len(PALETTE)], "symbol": SHAPES[number // len(PALETTE) % len(SHAPES)]}


def _hover(row: Scored) -> str:
    n_devices, error = words.count(row["standing"]["n_devices"]), words.signed_percent(row["error"])
    measured, ours, low, high = (words.seconds(row[key]) for key in ("measured_step_s", "step_s", "low_s", "high_s"))
    lines = [
        f"<b>{html.escape(row['model_name'])}</b>, {n_devices} {words.TIMES} {html.escape(row['device'])}",
        html.escape(f"{row['place']}, as {row['practice']}"),
        html.escape(f"{row['layout']}, micro-batch {row['micro_batch']}, remat {row['remat']}"),
        f"measured {measured}, forecast {ours} ({error}), range {low} to {high}",
    ]
    return "<br>".join(lines)


def series(rows: Sequence[Scored]) -> dict[str, list[tuple[str, list[Scored]]]]:
    """Weak-scaling series by source: (name, rows by rising device count). Same model, device, length, precision and
    sequences a device, three device counts or more; of each count the row that was measured fastest."""
    groups: dict[tuple[Any, ...], dict[int, Scored]] = {}
    for row in rows:
        n = row["standing"]["n_devices"]
        name = (row["source_id"], row["model_name"], row["device"], row["seq_len"], row["precision"])
        best = groups.setdefault((*name, round(row["tokens"] / n / (row["seq_len"] or 1), 4)), {})
        if n not in best or _rate(row, "measured_step_s") > _rate(best[n], "measured_step_s"):
            best[n] = row
    found: dict[str, list[tuple[str, list[Scored]]]] = {}
    for (source, model, device, length, precision, each), best in groups.items():
        if len(best) >= LEAST:
            text = f"{model}, {device}, length {length:,}, {precision}, {each:g} sequences a device"
            found.setdefault(source, []).append((text, [best[n] for n in sorted(best)]))
    return found


def _rate(row: Scored, key: str) -> float:
    return row["tokens"] / row[key] / row["standing"]["n_devices"]


def _length(ladder: tuple[str, list[Scored]]) -> float:
    """The factor by which a series scales."""
    return ladder[1][-1]["standing"]["n_devices"] / ladder[1][0]["standing"]["n_devices"]


def _ladders(rows: Sequence[Scored]) -> Figure:
    views, shown = [], []
    found = {source: sorted(ladders, key=_length, reverse=True) for source, ladders in series(rows).items()}
    for source, ladders in sorted(found.items(), key=lambda pair: _length(pair[1][0]), reverse=True):
        longest = ladders[:MOST_SERIES]
        left = f", {len(longest)} longest of {len(ladders)} series" if len(ladders) > len(longest) else ""
        traces = [trace for number, pair in enumerate(longest) for trace in _ladder(number, *pair)]
        views.append(View(f"{source}{left}", traces, "tokens/s a device (log scale)"))
        shown += [row for _, of in longest for row in of]
    rates = pd.Series([_rate(row, key) for row in shown for key in ("step_s", "measured_step_s")])
    layout = (
        {"xaxis": device_axis([r["standing"]["n_devices"] for r in shown]), "yaxis": log_axis(rates)} if shown else {}
    )
    caption = (
        "Runs of one model and batch a device on more and more devices; bars are the forecast's 80 % range, from the "
        "other sources. Where a count was run in several layouts, the one measured fastest."
    )
    return Figure("ladders", "Weak scaling", caption, views, layout, "Source")


def _ladder(number: int, name: str, rows: Sequence[Scored]) -> list[go.Scatter]:
    colour = PALETTE[number % len(PALETTE)]
    x = [row["standing"]["n_devices"] for row in rows]
    ours = [_rate(row, "step_s") for row in rows]
    bars = {
        "type": "data", "thickness": 1, "width": 3,
        "array": [_rate(row, "low_s") - y for row, y in zip(rows, ours, strict=True)],
        "arrayminus": [y - _rate(row, "high_s") for row, y in zip(rows, ours, strict=True)],
    }  # fmt: skip
    told = "<br>".join(html.escape(part) for part in textwrap.wrap(name, 60))
    shared: dict[str, Any] = {
        "x": x,
        "hovertext": [_hover(row) for row in rows],
        "hoverinfo": "text",
        "legendgroup": told,
    }

    def line(dash: str) -> dict[str, Any]:
        return {"color": colour, "width": 2, "dash": dash}

    ring = {"color": "white", "size": 8, "line": {"width": 2, "color": colour}}
    ours_look: dict[str, Any] = {"line": line("dash"), "marker": ring, "error_y": bars, "showlegend": False}
    return [
        go.Scatter(
            y=[_rate(row, "measured_step_s") for row in rows], name=told, line=line("solid"),
            mode="lines+markers", marker={"color": colour, "size": 8}, **shared,
        ),
        go.Scatter(y=ours, mode="lines+markers", **ours_look, **shared),
    ]  # fmt: skip


def _table(rows: Sequence[Mapping[str, Any]], name: str, title: str, columns: Mapping[str, str]) -> Table:
    def text(value: Any) -> str:
        return "" if value is None else f"{value:.1f}" if isinstance(value, float) else f"{value}"

    cells = [[str(row[name]), *(text(row.get(key)) for key in columns)] for row in rows]
    return Table(f"By {title}", "Errors of step time.", [title, *columns.values()], cells, 1)
