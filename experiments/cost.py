"""What the rungs of a folder cost to rent and to power.

    python -m experiments.cost runs/h100 --tokens=300e9 --term=spot

Takes about a second. Prices enter here and nowhere before, so a new price needs no new run: give it
with --usd_per_device_h, or in a facts file. Measured and forecast rungs are two tables. Rent includes
electricity, so the two are never added.
"""

import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments import entry, hardware, records
from experiments.hardware import Device, Facts
from experiments.records import Record
from transformer.errors import RequestError

HOURS_A_MONTH = 730.0  # 365 x 24 / 12
Spread = dict[str, float]  # "low", "median", "high"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    folder: str = entry.positional("DIR with records.jsonl")
    tokens: float | None = entry.flag(None, "token budget of a whole run, such as 300e9")
    term: Literal["on_demand", "spot"] = entry.flag("on_demand", "which of the known prices")
    usd_per_device_h: float | None = entry.flag(None, "your own price, instead of the known ones")
    usd_per_kwh: float | None = entry.flag(None, "your own price of electricity")
    facts: str | None = entry.flag(None, "TOML file of your own facts and prices")
    json: bool = entry.flag(False, "print the rows as JSON")


def main(request: Request) -> int | None:
    priced = rows(
        records.read(Path(request.folder)),
        hardware.load(request.facts),
        tokens=request.tokens,
        term=request.term,
        usd_per_device_h=request.usd_per_device_h,
        usd_per_kwh=request.usd_per_kwh,
    )
    if request.json:
        json.dump(priced, sys.stdout, indent=1, allow_nan=False)
        print()
    else:
        show(priced, request)


def rows(
    found: Iterable[Record],
    facts: Facts,
    *,
    tokens: float | None = None,
    term: str = "on_demand",
    usd_per_device_h: float | None = None,
    usd_per_kwh: float | None = None,
) -> list[dict[str, Any]]:
    """One dict per record, in order: what it is, its rent, its electricity.

    `usd_per_device_h` and `run_usd` are `{"low", "median", "high"}` over the known prices of `term`, or
    one price three times where `usd_per_device_h` is given (of a device as JAX counts it); other rents
    are at the median. Keys `run_*` are there only where `tokens` is. What cannot be said is None, and
    `why_not` says why. RequestError: a number that is not above zero, a device without facts.
    """
    numbers = {"tokens": tokens, "usd_per_device_h": usd_per_device_h, "usd_per_kwh": usd_per_kwh}
    for name, value in numbers.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise RequestError(f"--{name}={value:g}: expected a number above 0")
    kwh_price = facts.energy.usd_per_kwh if usd_per_kwh is None else usd_per_kwh
    return [
        _identity(record)
        | _row(
            tokens_per_s=_tokens_per_s(record),
            n_devices=record["n_devices"],
            rent=_rent(record["device"], facts, term, usd_per_device_h),
            power=watts(facts.device(record["device"]), facts.energy),
            usd_per_kwh=kwh_price,
            tokens=tokens,
            missing=_missing(record),
        )
        for record in found
    ]


def watts(device: Device, energy: hardware.Energy) -> tuple[float | None, str]:
    """Watts of one device as JAX counts it, at the meter of the building, and in words what they are.

    The system's where they are known (with the host's share), else the limit of the board, which is
    an upper bound of the board and leaves the host out unless `host_share` adds it. Times PUE.
    """
    device = device.per_jax_device()
    for name in ("system_w", "tdp_w"):
        board_w = getattr(device, name)
        if board_w is None:
            continue
        words, factor = device.sources[name].note, energy.pue
        if name == "tdp_w":
            host = f"{energy.host_share:g} of it added for the host" if energy.host_share else "host not counted"
            words = f"board at its limit: an upper bound, {host}" + (f"; {words}" if words else "")
            factor *= 1 + energy.host_share
        return board_w * factor, f"{board_w:g} W ({words or 'system'}) x PUE {energy.pue:g}"
    return None, f"no watts are known for {device.slug}"


def _rent(name: str, facts: Facts, term: str, own: float | None) -> tuple[Spread | None, list[str]]:
    """USD per device (as JAX counts it) and hour, and the sources; or None and the reason."""
    if own is not None:
        return _spread([own]), ["--usd_per_device_h"]
    device = facts.device(name)
    known = facts.prices(device.slug)
    prices = [price for price in known if price.term == term]
    if not prices:
        others = ", ".join(sorted({price.term for price in known}))
        hint = f"only {others}" if others else "give --usd_per_device_h"
        return None, [f"no {term} price of {device.slug} is known: {hint}"]
    sources = [f"{p.cloud}: {p.source}" + (f" ({p.date})" if p.date and p.date not in p.source else "") for p in prices]
    return _spread([p.usd_per_device_h / device.jax_devices_per_chip for p in prices]), sorted(set(sources))


def _row(
    *,
    tokens_per_s: float | None,
    n_devices: int,
    rent: tuple[Spread | None, list[str]],
    power: tuple[float | None, str],
    usd_per_kwh: float,
    tokens: float | None,
    missing: list[str],
) -> dict[str, Any]:
    price, sources = rent
    watts_per_device, basis = power
    median = None if price is None else price["median"]
    kw = None if watts_per_device is None else watts_per_device / 1e3
    hours_per_mtok = None if tokens_per_s is None else 1e6 / tokens_per_s / 3600
    device_hours = _product(hours_per_mtok, n_devices)  # of a million tokens
    row: dict[str, Any] = {
        "usd_per_device_h": price,
        "usd_per_h": _product(median, n_devices),
        "usd_per_mtok": _product(median, device_hours),
        "watts_per_device": watts_per_device,
        "watts_basis": None if kw is None else basis,
        "kwh_per_mtok": _product(kw, device_hours),
        "energy_usd_per_device_month": _product(kw, HOURS_A_MONTH, usd_per_kwh),
    }
    if tokens is not None:
        n_mtok = tokens / 1e6
        row |= {
            "run_days": _product(hours_per_mtok, n_mtok / 24),
            "run_usd": price and device_hours and {k: usd * device_hours * n_mtok for k, usd in price.items()},
            "run_kwh": _product(kw, device_hours, n_mtok),
            "run_energy_usd": _product(kw, device_hours, n_mtok, usd_per_kwh),
        }
    why_not = [*missing, *(sources if price is None else []), *([basis] if kw is None else [])]
    return row | {"price_sources": [] if price is None else sources, "why_not": "; ".join(why_not) or None}


def _product(*factors: float | None) -> float | None:
    """None where a factor is not known."""
    known = [factor for factor in factors if factor is not None]
    return math.prod(known) if len(known) == len(factors) else None


def _identity(record: Record) -> dict[str, Any]:
    step_s = record.get("step_s")
    kept = ("kind", "preset", "device", "n_devices")
    return {key: record[key] for key in kept} | {
        "layout": ",".join(f"{k}={v}" for k, v in record["layout"].items() if v not in (1, None)),
        "scaling": record["scaling"],
        "fits": record.get("fits"),
        "step_s": step_s["median"] if step_s else None,
        "tokens_per_s": _tokens_per_s(record),
    }


def _tokens_per_s(record: Record) -> float | None:
    return None if record.get("failed") else record.get("tokens_per_s") or None


def _missing(record: Record) -> list[str]:
    """Why a record has no speed, or why its speed will not be seen."""
    if record.get("failed"):
        return [f"failed: {record['failed']}"]
    reasons = [] if _tokens_per_s(record) else ["the record has no tokens_per_s"]
    return [*reasons, *(["does not fit in memory"] if record.get("fits") is False else [])]


def _spread(values: list[float]) -> Spread:
    return {"low": min(values), "median": statistics.median(values), "high": max(values)}


_RUNG = {"preset": "preset", "device": "device", "n_devices": "devices", "layout": "layout", "scaling": "scaling"}
_WORDS = ("preset", "device", "layout", "scaling", "why_not")
_TABLES = {
    "rent, which includes electricity": {
        "step_s": "step [s]",
        "tokens_per_s": "tokens/s",
        "usd_per_device_h": "USD/device/h",
        "usd_per_h": "USD/h",
        "usd_per_mtok": "USD/Mtok",
        "run_days": "run [days]",
        "run_usd": "run [USD]",
        "why_not": "note",
    },
    "electricity": {
        "watts_per_device": "W/device",
        "energy_usd_per_device_month": "USD/device/month",
        "kwh_per_mtok": "kWh/Mtok",
        "run_kwh": "run [kWh]",
        "run_energy_usd": "run [USD]",
    },
}


def show(priced: list[dict[str, Any]], request: Request) -> None:
    """Print a table of rent and one of electricity for the measured rows, then for the forecast ones."""
    console = Console(width=None if sys.stdout.isatty() else 200)  # a pipe has no width, and 80 would fold the layouts
    for kind in ("measured", "forecast"):
        of_kind = [row for row in priced if row["kind"] == kind]
        for title, columns in _TABLES.items():
            shown = {k: name for k, name in columns.items() if any(row.get(k) is not None for row in of_kind)}
            if not shown:
                continue
            term = f" ({request.term} prices: median, low to high)" if "usd_per_device_h" in shown else ""
            table = Table(title=f"{kind}: {title}{term}", title_justify="left", box=box.SIMPLE)
            for key, name in (_RUNG | shown).items():
                table.add_column(Text(name), justify="left" if key in _WORDS else "right", overflow="fold")
            for row in of_kind:
                table.add_row(*(Text(_text(row.get(key))) for key in _RUNG | shown))
            console.print(table)
    lines = {f"power: {row['device']} {row['watts_basis']}" for row in priced if row["watts_basis"]}
    lines |= {f"rent: {row['device']} {source}" for row in priced for source in row["price_sources"]}
    for line in sorted(lines):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _text(value: str | float | Mapping[str, float] | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        low, median, high = (_text(value[key]) for key in ("low", "median", "high"))
        return median if low == high else f"{median} ({low} to {high})"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    entry.start(main, Request)
