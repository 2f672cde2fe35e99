"""Figures with one line per curve against the device count: throughput, efficiency, utilisation, cost."""

import html
import textwrap
from typing import Any

import plotly.graph_objects as go

from experiments.report import words
from experiments.report.curves import Frame
from experiments.report.figure import FAINT, PALETTE, Figure, View, device_axis, log_axis

SHAPES = ("circle", "square", "diamond", "triangle-up")


def figures(along: Frame, tokens: float | None) -> list[Figure]:
    """The line figures that the records have numbers for, from the points of `curves.points`."""
    along = along.assign(hover=[_hover(row) for row in along.to_dict("records")], **_rates(along))
    drawn = [_throughput(along), _efficiency(along), _utilisation(along), _cost(along, tokens)]
    return [figure for figure in drawn if figure.views]


def _throughput(along: Frame) -> Figure:
    caption = "Whole-job tokens per second; bars span the 10th to 90th percentile, or the forecast's interval."
    views = [View("throughput", _lines(along, "tokens_per_s"), "tokens per second (log scale)")]
    return _figure("throughput", "Throughput", caption, views, along, log_axis(along["tokens_per_s"]))


def _efficiency(along: Frame) -> Figure:
    caption = (
        "Tokens per second per device, relative to the smallest rung of the same curve: that rung is 100 % by "
        "definition. Weak and strong scaling are separate curves."
    )
    views = [View("efficiency", _lines(along, "efficiency"), "efficiency, smallest rung = 100 %")]
    return _figure("efficiency", "Scaling efficiency", caption, views, along, _percent_axis())


def _utilisation(along: Frame) -> Figure:
    caption = (
        "Model FLOPs utilisation: the model's arithmetic, recomputation not counted, over the dense peak of the "
        "devices. Attention is counted whole (full) or, as a causal model needs it, by half (causal)."
    )
    conventions = {"full": "attention counted in full", "causal": "attention counted causal (half)"}
    views = [
        View(f"{key}: {text}", _lines(along, f"mfu_{key}"), f"MFU ({key} convention)")
        for key, text in conventions.items()
    ]
    return _figure("mfu", "Utilisation (MFU)", caption, views, along, _percent_axis(), "Convention")


def _cost(along: Frame, tokens: float | None) -> Figure:
    caption = "Rent at the median on-demand price found; bars span the lowest to the highest."
    views = [View("USD per million tokens", _lines(along, "usd_per_mtok"), "USD per million tokens (log scale)")]
    if tokens:
        name = f"USD per run of {words.amount(tokens)} tokens"
        views.append(View(name, _lines(along, "run_usd"), f"{name} (log scale)"))
    return _figure("cost", "Cost", caption, views, along, log_axis(along["usd_per_mtok"], along["run_usd"]), "Per")


def _figure(
    anchor: str,
    title: str,
    caption: str,
    views: list[View],
    along: Frame,
    y_axis: dict[str, Any],
    chooses: str = "",
) -> Figure:
    # The second y axis is hidden: marks of rungs that do not run sit on the floor, having no number to sit at.
    floor = {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True}
    layout = {"xaxis": device_axis(along["n_devices"]), "yaxis": y_axis, "yaxis2": floor}
    return Figure(anchor, title, caption, [view for view in views if view.traces], layout, chooses)


def _lines(along: Frame, column: str) -> list[go.Scatter]:
    """Per curve a line through its best rungs and marks for the others; [] if `column` is known nowhere."""
    known = along[along[column].notna() & (along["verdict"] == "")]
    if known.empty:
        return []
    traces = []
    for look, ladder in enumerate(along["ladder"].unique()):
        for kind, curve in known[known["ladder"] == ladder].groupby("kind", sort=False):
            best, others = curve[curve["best"]], curve[~curve["best"]]
            traces.append(_trace(best, column, str(kind), look, name=_legend(curve)))
            if not others.empty:
                traces.append(_trace(others, column, str(kind), look, mode="markers", showlegend=False))
    return [*traces, *_stopped(along)]


def _trace(points: Frame, column: str, kind: str, look: int, **told: Any) -> go.Scatter:
    """One curve's points. `look` numbers the ladder: its colour, and its shape once the colours are used up."""
    colour, shape = PALETTE[look % len(PALETTE)], SHAPES[look // len(PALETTE) % len(SHAPES)]
    measured = kind == "measured"
    bars = None
    if f"{column}_low" in points and points[f"{column}_low"].notna().any():
        above, below = points[f"{column}_high"] - points[column], points[column] - points[f"{column}_low"]
        bars = {"type": "data", "array": list(above), "arrayminus": list(below), "thickness": 1, "width": 3}
    return go.Scatter(
        x=list(points["n_devices"]),
        y=list(points[column]),
        error_y=bars,
        hovertext=list(points["hover"]),
        hoverinfo="text",
        legendgroup=str(points["curve"].iloc[0]),
        line={"color": colour, "width": 2, "dash": "solid" if measured else "dash"},
        marker={
            "color": colour if measured else "white",
            "size": 8,
            "line": {"width": 2, "color": colour},
            "symbol": shape,
        },
        **{"mode": "lines+markers"} | told,
    )


def _stopped(along: Frame) -> list[go.Scatter]:
    """Rungs that failed or do not fit: a cross on the floor of the figure, the reason on hover."""
    stopped = along[along["verdict"] != ""]
    if stopped.empty:
        return []
    return [
        go.Scatter(
            x=list(stopped["n_devices"]),
            y=[0.03] * len(stopped),
            yaxis="y2",
            mode="markers",
            marker={"symbol": "x-thin", "size": 9, "color": FAINT, "line": {"width": 2, "color": FAINT}},
            hovertext=list(stopped["hover"]),
            hoverinfo="text",
            name="failed or does not fit (see the table)",
        )
    ]


def _legend(curve: Frame) -> str:
    """The curve's name, broken to fit a phone, and what a reader must know of its measurements."""
    lines = textwrap.wrap(str(curve["curve"].iloc[0]), 46)
    name = "<br>".join(html.escape(line) for line in lines)
    note = curve["note"].iloc[-1]
    if not note:
        return name
    return f"{name}<br><i>{'<br>'.join(html.escape(line) for line in textwrap.wrap(note, 50))}</i>"


def _hover(row: dict[str, Any]) -> str:
    head = f"<b>{words.count(row['n_devices'])} {words.TIMES} {html.escape(row['device'])}</b> · {row['kind']}"
    lines = [head, html.escape(row["ladder"]), f"layout {html.escape(row['layout'])}"]
    if row["verdict"]:
        return "<br>".join([*lines, *(html.escape(line) for line in textwrap.wrap(row["verdict"], 60)[:6])])
    numbers = {
        "step {}": words.seconds(row["step_s"]),
        "{} tokens per second": words.amount(row["tokens_per_s"]),
        f"efficiency {{}} of {words.count(row['base_devices'])} devices": words.percent(row["efficiency"]),
        "MFU {} full": words.percent(row["mfu_full"]),
        "MFU {} causal": words.percent(row["mfu_causal"]),
        "{} per hour": words.usd(row["usd_per_h"]),
        "{} per million tokens": words.usd(row["usd_per_mtok"]),
        "{} per run": words.usd(row["run_usd"]),
    }
    lines += [text.format(value) for text, value in numbers.items() if value != words.DASH]
    return "<br>".join([*lines, *(f"<i>{html.escape(line)}</i>" for line in textwrap.wrap(row["note"], 60))])


def _rates(along: Frame) -> dict[str, Frame]:
    """The spread of throughput that the spread of step time makes: the slowest step is the lowest rate."""
    step_tokens = along["tokens_per_s"] * along["step_s"]
    return {
        "tokens_per_s_low": step_tokens / along["step_high_s"],
        "tokens_per_s_high": step_tokens / along["step_low_s"],
    }


def _percent_axis() -> dict[str, Any]:
    return {"tickformat": ".1~%", "rangemode": "tozero"}
