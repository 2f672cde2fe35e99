"""What every figure shares: colours, fonts, axes, and the choice of one view at a time.

Measured and forecast look different everywhere: filled and solid against hollow and dashed.
"""

import math
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from experiments.report import words
from experiments.report.curves import Frame

# Okabe and Ito (2008), told apart by colour-blind readers; without yellow, which is faint on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#4D4D4D")
INK, FAINT, GRID = "#1b1f24", "#6b7280", "#e5e7eb"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
LEGEND_ROW_PX = 21


@dataclass(frozen=True)
class View:
    """Traces that are seen together, under one title of the y axis."""

    name: str
    traces: list[Any]  # go.Scatter or go.Bar
    y_title: str


@dataclass(frozen=True)
class Figure:
    """One figure of the page; where it has several views, the reader chooses one. `chooses` says what by."""

    anchor: str
    title: str
    caption: str
    views: list[View]
    layout: dict[str, Any]
    chooses: str = ""


def draw(figure: Figure) -> go.Figure:
    """The plotly figure: traces of all views, those of the first one visible."""
    drawn = go.Figure(layout=_layout() | figure.layout)
    for number, view in enumerate(figure.views):
        for trace in view.traces:
            drawn.add_trace(trace)
            drawn.data[-1].update(visible=number == 0)
    rows = max(sum(trace.showlegend is not False for trace in view.traces) for view in figure.views)
    breaks = max(sum((trace.name or "").count("<br>") for trace in view.traces) for view in figure.views)
    per_row = 1 if drawn.layout.legend.orientation == "v" else 3
    drawn.update_layout(height=380 + LEGEND_ROW_PX * (min(rows, 12) // per_row + min(breaks, 12)))
    drawn.update_layout(yaxis_title_text=figure.views[0].y_title)
    return drawn


def device_axis(n_devices: Frame) -> dict[str, Any]:
    """A log axis of device counts whose labels are the counts that occur, as many as there is room for."""
    counts = sorted(set(n_devices))
    room = (counts[-1] / counts[0]) ** (1 / 16)
    ticks = [counts[0]]
    for n in counts[1:]:
        if n >= ticks[-1] * room:
            ticks.append(n)
    if ticks[-1] != counts[-1]:
        ticks[-1 if len(ticks) > 1 else len(ticks) :] = [counts[-1]]
    return {
        "type": "log",
        "title": {"text": "devices (log scale)", "standoff": 8},
        "tickmode": "array",
        "tickvals": ticks,
        "ticktext": [words.short(n) for n in ticks],
    }


def log_axis(*columns: Frame) -> dict[str, Any]:
    """A log axis for whichever of the columns is shown, its ticks spelled out.

    Plotly's own would say "2" and "5" between 10 and 100 and leave the reader to multiply.
    """
    ticks = set()
    for column in columns:
        known = column[column > 0]
        if known.empty:
            continue
        low, high = math.floor(math.log10(known.min())), math.ceil(math.log10(known.max()))
        digits = (
            (1,)
            if high - low > 3
            else (1, 2, 5)
            if known.max() > 6 * known.min()
            else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
        )
        ticks |= {digit * 10.0**power for power in range(low - 1, high + 1) for digit in digits}
    return {"type": "log", "tickvals": sorted(ticks), "ticktext": [words.short(tick) for tick in sorted(ticks)]}


def _layout() -> dict[str, Any]:
    axis = {
        "gridcolor": GRID,
        "zeroline": False,
        "linecolor": "#9ca3af",
        "ticks": "outside",
        "tickcolor": "#9ca3af",
        "ticklen": 4,
        "automargin": True,
    }
    return {
        "template": go.layout.Template(layout={"xaxis": axis, "yaxis": axis, "xaxis2": axis, "yaxis2": axis}),
        "font": {"family": FONT, "size": 12, "color": INK},
        "showlegend": True,  # even of one curve: its label says measured or forecast
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "margin": {"l": 56, "r": 12, "t": 30, "b": 48},
        "hoverlabel": {"bgcolor": "white", "bordercolor": "#9ca3af", "align": "left", "font": {"color": INK}},
        "legend": {"orientation": "v", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "xanchor": "left"},
    }
