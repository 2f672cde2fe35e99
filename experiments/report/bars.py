"""Figures with one stacked bar per rung, one curve at a time: memory by class, and where the step goes."""

import html
from collections.abc import Callable, Iterable
from typing import Any

import plotly.graph_objects as go

from experiments.report import words
from experiments.report.curves import Frame
from experiments.report.figure import FAINT, INK, PALETTE, Figure, View

PATTERNS = ("", ".", "x", "|")
Looks = dict[str, tuple[str, str]]  # part -> colour, pattern


def figures(along: Frame) -> list[Figure]:
    """The bar figures that the records have numbers for, from the points of `curves.points`."""
    return [figure for figure in (_memory(along), _breakdown(along)) if figure.views]


def _memory(along: Frame) -> Figure:
    caption = (
        "Bytes per device by class, as the compiled program allots them; the black mark is the device's limit. "
        "A bar above it does not fit. Pale bars are forecasts."
    )
    known = along[along["memory_bytes"].notna()].copy()
    known["memory"] = [row["memory"] or {"total": row["memory_bytes"]} for row in known.to_dict("records")]
    looks = _looks(known["memory"])
    views = []
    for name, curve in _curves(known):
        stacks = _stacks(curve, "memory", looks, words.memory, scale=1e-9)
        views.append(View(name, [*stacks, *_limits(curve)], "GB per device (GB = 10⁹ bytes)"))
    layout = {"barmode": "stack", "xaxis": _rung_axis(), "legend": _legend()}
    return Figure("memory", "Memory per device", caption, views, layout, "Curve")


def _breakdown(along: Frame) -> Figure:
    caption = (
        "Where each forecast step goes. Above: the parts that add up to the step. Below, hatched: communication "
        "that is hidden behind compute; it costs no time and is not added."
    )
    known = along[along["breakdown_s"].astype(bool)]
    looks, hidden_looks = _looks(known["breakdown_s"]), _looks(known["hidden_s"])
    views = []
    for name, curve in _curves(known):
        shown = _stacks(curve, "breakdown_s", looks, words.seconds)
        hidden = _stacks(curve, "hidden_s", hidden_looks, words.seconds, prefix="hidden: ")
        for trace in hidden:
            trace.update(yaxis="y2", marker={"pattern": {"shape": "/", "fillmode": "replace", "bgcolor": "white"}})
        views.append(View(name, [*shown, *hidden], "seconds per step"))
    layout = {
        "barmode": "stack",
        "xaxis": _rung_axis() | {"anchor": "y2"},
        "yaxis": {"domain": [0.36, 1], "exponentformat": "none"},
        "yaxis2": {"domain": [0, 0.24], "title": {"text": "hidden, s"}, "exponentformat": "none"},
        "legend": _legend(),
    }
    return Figure("breakdown", "Where the step goes (forecast)", caption, views, layout, "Curve")


def _curves(known: Frame) -> list[tuple[str, Frame]]:
    """Curves and their names, the one that reaches furthest first: it is the one shown before anyone chooses."""
    curves = [
        (str(name), curve.assign(label=_rung_labels(curve))) for name, curve in known.groupby("curve", sort=False)
    ]
    return sorted(curves, key=lambda item: -item[1]["n_devices"].max())


def _stacks(
    curve: Frame, column: str, looks: Looks, write: Callable[[Any], str], *, scale: float = 1.0, prefix: str = ""
) -> list[go.Bar]:
    """One trace per part that occurs on this curve, a bar for every rung."""
    rungs = list(curve["label"])
    solid = curve["kind"].iloc[0] == "measured"
    wholes = [sum(parts.values()) or 1 for parts in curve[column]]
    traces = []
    for part, (colour, pattern) in looks.items():
        values = [parts.get(part) for parts in curve[column]]
        if not any(values):
            continue
        name = html.escape(f"{prefix}{part.replace('_', ' ')}")
        hover = [
            f"<b>{rung} devices</b> · {name}<br>{write(value)} ({words.percent((value or 0) / whole)})"
            for rung, value, whole in zip(rungs, values, wholes, strict=True)
        ]
        traces.append(
            go.Bar(
                x=rungs,
                y=[scale * (value or 0) for value in values],
                name=name,
                hovertext=hover,
                hoverinfo="text",
                marker={
                    "color": colour if solid else _pale(colour),
                    "line": {"color": colour, "width": 1.2},
                    "pattern": {"shape": pattern},
                },
            )
        )
    return traces


def _limits(curve: Frame) -> list[go.Scatter]:
    known = curve[curve["limit_bytes"].notna()]
    if known.empty:
        return []
    text = "limit " + " / ".join(words.memory(b) for b in sorted(set(known["limit_bytes"])))
    mark = {"symbol": "line-ew", "size": 34, "line": {"width": 3, "color": INK}}
    y = list(known["limit_bytes"] * 1e-9)
    return [go.Scatter(x=list(known["label"]), y=y, mode="markers", marker=mark, name=text, hoverinfo="name")]


def _rung_labels(curve: Frame) -> list[str]:
    """Device counts, with the layout where several layouts share one."""
    repeated = curve["n_devices"].duplicated(keep=False)
    return [
        words.count(n) + (f"<br>{html.escape(layout)}" if several else "")
        for n, layout, several in zip(curve["n_devices"], curve["layout"], repeated, strict=True)
    ]


def _looks(parts: Iterable[dict[str, float]]) -> Looks:
    """One look per part, the same in every view; patterns once the colours are used up."""
    names = list(dict.fromkeys(name for row in parts for name in row))
    return {
        name: (PALETTE[i % len(PALETTE)], PATTERNS[i // len(PALETTE) % len(PATTERNS)]) for i, name in enumerate(names)
    }


def _pale(colour: str) -> str:
    """Halfway to white: a forecast's fill."""
    return "#" + "".join(f"{(int(colour[i : i + 2], 16) + 255) // 2:02x}" for i in (1, 3, 5))


def _rung_axis() -> dict[str, Any]:
    return {"type": "category", "title": {"text": "devices", "standoff": 8}, "tickfont": {"color": FAINT}}


def _legend() -> dict[str, Any]:
    return {
        "orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "xanchor": "left",
        "entrywidth": 150, "traceorder": "normal",
    }  # fmt: skip
