"""The range of a forecast: how far published runs lay from theirs when their own source was left out.

`python -m experiments.validate --interval_to` makes the table that is read here; docs/validation.md says how.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from transformer.errors import RequestError

PUBLISHED = Path(__file__).parents[1] / "published" / "intervals.json"
HELD = 0.8
"""The part of runs that a range is to hold."""
LARGEST = 16_384
"""Devices of the largest runs with a public step time (Llama 3 405B, on H100)."""
SCALES = (8, 512, LARGEST)
"""Groups of device counts end here: a node, what one switch or pod reaches, the largest measured."""
FARTHEST = 2
Ground = Mapping[tuple[str, str], frozenset[str]]
"""Sources of published runs, by device (slug) and practice."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What of a forecast says how well known its ground is."""

    device: str  # slug
    practice: str  # how the program runs: a name of experiments.validation.frameworks
    n_devices: int
    context_or_experts: bool  # sequences split over devices, or a mixture of experts

    @property
    def scale(self) -> int:
        """Number of the group of device counts; what is larger than all is with the last."""
        return sum(self.n_devices > top for top in SCALES[:-1])


class Width(NamedTuple):
    """Of a group: 80 % of its runs lie between the forecast over and times 1 + half_width."""

    half_width: float
    rows: int
    sources: int


class Range(NamedTuple):
    half_width: float
    distance: int
    reason: str

    def around(self, step_s: float) -> dict[str, float]:
        """`step_s` of a record, in seconds."""
        return {"median": step_s, "low": step_s / (1 + self.half_width), "high": step_s * (1 + self.half_width)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Backtests:
    """Half-widths by (source left out, or "" for none; scale; distance), and the ground that runs cover. `made` says
    when, by what command and from how much."""

    ground: Ground
    widths: Mapping[tuple[str, int, int], Width]
    made: Mapping[str, Any]

    @property
    def sources(self) -> frozenset[str]:
        return frozenset().union(*self.ground.values())

    def range_of(self, standing: Standing, source: str = "") -> Range:
        """The range of a forecast; of a run of `source`, from the other sources alone."""
        left_out = source if source in self.sources else ""
        distance, why = far(standing, self.ground, {left_out})
        width = self.widths[left_out, standing.scale, distance]
        half_width = width.half_width
        if standing.n_devices > LARGEST:
            half_width = (1 + half_width) ** math.sqrt(standing.n_devices / LARGEST) - 1
            why.append(
                f"no public measurement exists above {LARGEST:,} GPUs: the range of {span(len(SCALES) - 1)} "
                f"devices, its logarithm widened by the square root of {standing.n_devices:,} over {LARGEST:,}"
            )
        held = (
            f"{100 * HELD:g} % of {width.rows:,} published runs of {width.sources} sources, {span(standing.scale)} "
            f"devices, distance {distance}, their own source left out"
        )
        return Range(half_width, distance, "; ".join([held, *why]))


def far(standing: Standing, ground: Ground, but: set[str]) -> tuple[int, list[str]]:
    """Distance from calibrated ground, from 0 to FARTHEST steps, with their reasons. Sources `but` do not count."""
    why = []
    if not ground.get((standing.device, standing.practice), frozenset()) - but:
        why.append(f"no published run to compare with is of {standing.practice} on {standing.device}")
    if standing.context_or_experts:
        why.append("context parallelism or experts")
    return len(why), why


def span(scale: int) -> str:
    """The device counts of a group.

    >>> span(1)
    '9 to 512'
    """
    return f"{SCALES[scale - 1] + 1 if scale else 1:,} to {SCALES[scale]:,}"


def write(path: Path, found: Backtests) -> None:
    """One JSON object, an entry a line. RequestError where it cannot be written."""
    ground = [
        {"device": device, "practice": practice, "sources": sorted(sources)}
        for (device, practice), sources in sorted(found.ground.items())
    ]
    widths = [
        {"left_out": left_out, "devices": SCALES[scale], "distance": distance, **width._asdict()}
        for (left_out, scale, distance), width in sorted(found.widths.items())
    ]
    parts = {"ground": ground, "widths": widths}
    lines = [
        f'"{name}": [\n ' + ",\n ".join(json.dumps(entry) for entry in entries) + "\n]"
        for name, entries in parts.items()
    ]
    text = "{" + ",\n".join([f'"made": {json.dumps(found.made, indent=1)}', *lines]) + "}\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path}: cannot be written ({error.strerror})") from None


def read(path: Path) -> Backtests:
    found = json.loads(path.read_text(encoding="utf-8"))
    return Backtests(
        ground={(g["device"], g["practice"]): frozenset(g["sources"]) for g in found["ground"]},
        widths={
            (w["left_out"], SCALES.index(w["devices"]), w["distance"]): Width(w["half_width"], w["rows"], w["sources"])
            for w in found["widths"]
        },
        made=found["made"],
    )


@cache
def published() -> Backtests:
    """The table that ships with the program."""
    return read(PUBLISHED)
