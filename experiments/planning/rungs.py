"""What a plan says of a device count: its options as rows, its best as a record, the cheapest count that makes it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.config import RunConfig
from experiments.forecast.closed_form.step import Forecast
from experiments.forecast.topology import chip_of
from experiments.hardware import Device
from experiments.planning.search import Found, Option, Search, reason
from experiments.records import Record
from transformer.accounting import mfu_peak

Row = dict[str, Any]


@dataclass(slots=True)
class Plan:
    """Of one device count. `beside`: the layout that is to be compared, at its best."""

    n_devices: int
    found: Found
    beside: Option | None = None
    simulated: dict[Option, Record] = field(default_factory=dict)

    @property
    def winner(self) -> Option | None:
        """The fastest of those that were simulated and fit; else of all in closed form. None: nothing fits."""
        ran = [option for option in self.simulated if option is not self.beside and self.simulated_s(option)]
        if ran:
            return min(ran, key=lambda option: self.simulated_s(option) or math.inf)
        left = (option for option in self.found.fitting if option not in self.simulated)
        return next(left, None)

    def simulated_s(self, option: Option) -> float | None:
        """None where it was not, or cannot run."""
        record = self.simulated.get(option)
        if record is None or record["failed"] or record["fits"] is False:
            return None
        return record["step_s"]["median"]

    def why(self, option: Option) -> str:
        """Why it loses, or that it wins."""
        winner, record = self.winner, self.simulated.get(option)
        if record and self.simulated_s(option) is None:
            total = (record.get("memory_bytes") or {}).get("total")
            return f"does not fit when compiled: {total / 1e9:,.0f} GB" if total else "does not compile"
        if winner is None or not option.fits:
            return reason(option, option)
        if option == winner:
            return "the best"
        ran, best = self.simulated_s(option), self.simulated_s(winner)
        if ran and best:
            words = reason(option, winner)
            return f"simulated {100 * (ran / best - 1):+.0f} %" + ("" if words == "as fast" else f", {words}")
        return reason(option, winner)


def row(option: Option, plan: Plan, run: RunConfig, usd_per_device_h: float | None) -> Row:
    """An option as a table or a line of JSON has it."""
    tokens = option.global_batch_seqs * run.length
    step_s = plan.simulated_s(option) or (option.step_s if option.fits else None)
    hours = None if step_s is None else option.n_devices * step_s / 3600
    record = plan.simulated.get(option)
    return {
        "n_devices": option.n_devices, "layout": str(option.layout), "remat": option.remat,
        "micro_batch_seqs": option.micro_batch_seqs, "microbatches": option.microbatches, "fits": option.fits,
        "step_s": option.step_s if option.fits else None, "simulated_step_s": plan.simulated_s(option),
        "memory_bytes": option.total_bytes,
        "simulated_memory_bytes": ((record or {}).get("memory_bytes") or {}).get("total"),
        "usd_per_mtok": hours and usd_per_device_h and hours * usd_per_device_h / tokens * 1e6,
        "breakdown_s": option.forecast.breakdown_s if option.forecast else None,
        "why": plan.why(option),
    }  # fmt: skip


def record(option: Option, run: RunConfig, search: Search, device: Device) -> Record:
    """The closed form's record of an option that fits, of `run`, which has its layout."""
    found, rung = option.forecast, run.rung(option.n_devices)
    assert found is not None
    peak = search.model.rates.peak(mfu_peak(run.resolved_precision(device.platform)))
    return run.record(rung, kind="forecast", device=device.slug, chip=chip_of(search.device)) | {
        "method": "closed_form",
        "step_s": dict.fromkeys(("median", "low", "high"), found.step_s),
        **run.speed(rung, found.step_s, peak),
        "memory_bytes": _by_class(found) | {"total": found.total_bytes, "limit": search.device.usable_bytes},
        "fits": option.fits,
        "breakdown_s": found.breakdown_s,
        "hidden_s": found.hidden_s,
    }


def _by_class(found: Forecast) -> dict[str, float]:
    """As other records have it: what is stored, a third parameters and the rest moments; and what a step makes."""
    stored = found.memory_bytes["optimizer"]
    return {
        "params": stored / 3,
        "optimizer": stored * 2 / 3,
        "temporaries": found.total_bytes - stored,
    }


def rung(priced: Row, option: Option, *, budget_usd: float | None, deadline_days: float | None) -> Row:
    """An option's priced record: its whole run, with failures where they are known, and whether it keeps the limits."""
    days = priced.get("run_days_with_failures") or priced.get("run_days")
    spread = priced.get("run_usd_with_failures") or priced.get("run_usd")
    usd = spread["median"] if spread else None
    over = [
        f"{value:,.4g} {unit} over {limit:,.4g}" if value else f"no {unit} are known"
        for value, limit, unit in ((usd, budget_usd, "USD"), (days, deadline_days, "days"))
        if limit is not None and (value is None or value > limit)
    ]
    return {
        "n_devices": option.n_devices, "layout": str(option.layout), "days": days, "usd": usd,
        "goodput": priced.get("run_goodput"), "makes_it": not over,
        "why": "; ".join(over) or priced.get("run_why_not"),
    }  # fmt: skip


def cheapest(rungs: Sequence[Row]) -> Row | None:
    """Of the rungs that keep the limits: by price, or device-days where no price is known."""
    kept = [one for one in rungs if one["makes_it"] and one["days"]]
    known = all(one["usd"] for one in kept)
    return min(kept, key=lambda one: one["usd"] if known else one["days"] * one["n_devices"], default=None)
