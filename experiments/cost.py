"""What the rungs of a folder cost to rent and to power.

    python -m experiments.cost runs/h100 --tokens=300e9 --term=spot

Takes about a second. Prices enter here and nowhere before, so a new price needs no new run: give it
with --usd_per_device_h, or in a facts file. Measured and forecast rungs are two tables. Rent includes
electricity, so the two are never added. Where --tokens is given, so is the whole run: without failures,
and with those that a cluster of that size meets (docs/runs.md).
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

from experiments import entry, hardware, records, runs
from experiments.hardware import Device, Facts
from experiments.records import Record, layout_text
from transformer.errors import RequestError

HOURS_A_MONTH = 730.0  # 365 x 24 / 12
Spread = dict[str, float]  # "low", "median", "high"
_AS_KNOWN = runs.Asked()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request(runs.Asked):
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
        asked=request,
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
    asked: runs.Asked = _AS_KNOWN,
) -> list[dict[str, Any]]:
    """One dict per record, in order: what it is, its rent, its electricity.

    `usd_per_device_h` and `run_usd` are `{"low", "median", "high"}` over the known prices of `term`, or
    one price three times where `usd_per_device_h` is given (of a device as JAX counts it); other rents
    are at the median. Keys `run_*` are there only where `tokens` is: of the run without failures, and,
    where `run_why_not` is None, with them (`runs.row`). What cannot be said is None, and `why_not` says
    why. RequestError: a number that is not above zero, a device without facts.
    """
    found = list(found)
    numbers = {"tokens": tokens, "usd_per_device_h": usd_per_device_h, "usd_per_kwh": usd_per_kwh}
    for name, value in numbers.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise RequestError(f"--{name}={value:g}: expected a number above 0")
    kwh_price = facts.energy.usd_per_kwh if usd_per_kwh is None else usd_per_kwh
    priced = [
        _row(
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
    if tokens is not None:
        priced = [row | _with_failures(row, record, facts, asked) for row, record in zip(priced, found, strict=True)]
    return [_identity(record) | row for row, record in zip(priced, found, strict=True)]


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


def _with_failures(row: dict[str, Any], record: Record, facts: Facts, asked: runs.Asked) -> dict[str, Any]:
    """The run of a row with failures: all nodes and spares are rented throughout, and draw their full watts, but for
    the spares."""
    if row["run_days"] is None:
        return {"run_why_not": row["why_not"]}
    run = runs.row(record, facts.device(record["device"]), facts.reliability, asked, row["run_days"] * runs.DAY_S)
    if run["run_why_not"]:
        return run
    longer, n_devices = 1 / run["run_goodput"], record["n_devices"]
    rented = longer * (n_devices + run["run_spare_devices"]) / n_devices
    return run | {
        "run_usd_with_failures": row["run_usd"] and {k: usd * rented for k, usd in row["run_usd"].items()},
        "run_kwh_with_failures": _product(row["run_kwh"], longer),
        "run_energy_usd_with_failures": _product(row["run_energy_usd"], longer),
    }


def _product(*factors: float | None) -> float | None:
    """None where a factor is not known."""
    known = [factor for factor in factors if factor is not None]
    return math.prod(known) if len(known) == len(factors) else None


def _identity(record: Record) -> dict[str, Any]:
    step_s = record.get("step_s")
    kept = ("kind", "preset", "device", "n_devices")
    return {key: record[key] for key in kept} | {
        "layout": layout_text(record["layout"]),
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
_WORDS = ("preset", "device", "layout", "scaling", "why_not", "run_why_not")
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
    "whole run with failures": {
        "run_goodput": "goodput",
        "run_days_with_failures": "days",
        "run_days_simulated": "simulated",
        "run_usd_with_failures": "USD",
        "run_failures": "failures",
        "run_spare_nodes": "spare nodes",
        "run_checkpoint_s": "checkpoint [s]",
        "run_interval_s": "every [s]",
        "run_interval_simulated_s": "simulated",
        "run_why_not": "note",
    },
    "electricity": {
        "watts_per_device": "W/device",
        "energy_usd_per_device_month": "USD/device/month",
        "kwh_per_mtok": "kWh/Mtok",
        "run_kwh": "run [kWh]",
        "run_energy_usd": "run [USD]",
        "run_kwh_with_failures": "with failures [kWh]",
        "run_energy_usd_with_failures": "with failures [USD]",
    },
}


def show(priced: list[dict[str, Any]], request: Request) -> None:
    """Print tables of rent, of whole runs and of electricity for the measured rows, then for the forecast ones."""
    console = Console(width=None if sys.stdout.isatty() else 200)  # a pipe has no width, and 80 would fold the layouts
    for kind in ("measured", "forecast"):
        of_kind = [row for row in priced if row["kind"] == kind]
        for title, columns in _TABLES.items():
            shown = {k: name for k, name in columns.items() if any(row.get(k) is not None for row in of_kind)}
            if not shown:
                continue
            table = Table(title=f"{kind}: {title}{_remark(shown, request)}", title_justify="left", box=box.SIMPLE)
            rung = {k: name for k, name in _RUNG.items() if k != "scaling" or "run_goodput" not in shown}
            for key, name in (rung | shown).items():
                table.add_column(Text(name), justify="left" if key in _WORDS else "right", overflow="fold")
            for row in of_kind:
                table.add_row(*(Text(_text(row.get(key))) for key in rung | shown))
            console.print(table)
    lines = {f"power: {row['device']} {row['watts_basis']}" for row in priced if row["watts_basis"]}
    lines |= {f"rent: {row['device']} {source}" for row in priced for source in row["price_sources"]}
    lines |= {
        f"run: {row['device']} {fact['name']} = {fact['value']:.4g}: {fact['source']}"
        for row in priced
        for fact in row.get("run_rests_on", ())
    }
    for line in sorted(lines):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _remark(shown: Mapping[str, str], request: Request) -> str:
    """What to know of ranges."""
    if "usd_per_device_h" in shown:
        return f" ({request.term} prices: median, low to high)"
    return f" (simulated: mean, and 80 % of {request.runs} runs)" if "run_days_simulated" in shown else ""


def _text(value: str | float | Mapping[str, float] | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        low, middle, high = map(_text, value.values())
        return middle if low == high else f"{middle} ({low} to {high})"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    entry.start(main, Request)
