"""From records to curves: one tidy frame, scaling efficiency, forecasts beside their measurements.

A **ladder** is what may be compared along the device count: one preset (and model, if overridden), device,
scaling, sequence length, precision, rematerialisation, batch and layout family. A **curve** is a ladder and a
kind: measured and forecast never share one, and neither do weak and strong scaling.

The **family** of a layout is the set of its axes above one, without `data`, which only takes what is left:
`data=2,fsdp=8` and `data=16,fsdp=8` are both `fsdp`. A single device has no axes, so it opens every curve that is
otherwise like it.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from experiments.records import Record, chosen, layout_text, rung_key

Frame = Any  # a pandas DataFrame or one of its columns; pandas ships no types, and inferred ones are unions of all
SAME = ["preset", "variant", "device", "scaling", "seq_len", "precision", "remat", "batch"]
NUMBERS = [
    "step_s", "step_low_s", "step_high_s", "tokens_per_s", "tokens_per_s_per_device", "mfu_full", "mfu_causal", "hfu",
    "memory_bytes", "limit_bytes",
]  # fmt: skip
PRICES = [
    "usd_per_h", "usd_per_mtok", "usd_per_mtok_low", "usd_per_mtok_high",
    "run_usd", "run_usd_low", "run_usd_high", "run_days",
    "run_goodput", "run_goodput_low", "run_goodput_high", "run_days_with_failures", "run_days_low", "run_days_high",
    "run_usd_with_failures", "run_failures", "run_spare_nodes", "run_checkpoint_s", "run_interval_s",
    "run_interval_simulated_s",
]  # fmt: skip


def frame(records: Sequence[Record], costs: Sequence[Mapping[str, Any]]) -> Frame:
    """One row per record with what the page shows of it; `costs` are the rows of `experiments.cost`, same order.

    A number that is not known is NaN. `verdict` is why a rung does not run, or "": a failed one has no numbers, and
    one that does not fit has numbers that nobody will see, so neither is a point of a curve. `efficiency` is relative
    to the `base_devices` of the same curve.
    """
    variants = _variants(records)
    rows = [
        _row(record) | _price(cost) | {"variant": variant}
        for record, cost, variant in zip(records, costs, variants, strict=True)
    ]
    rungs = pd.DataFrame(rows).astype(dict.fromkeys(NUMBERS + PRICES, float))
    rungs.loc[rungs["verdict"] != "", PRICES] = float("nan")  # nobody can buy a run that does not run
    rungs["families"] = _families(rungs)
    rungs["name"] = _names(rungs)
    along = points(rungs)
    for column in ("efficiency", "base_devices"):
        rungs[column] = along[column].groupby(level=0).first()
    return rungs


def points(rungs: Frame) -> Frame:
    """One row per rung and curve, in order along the curve, with its efficiency; the index is that of `rungs`.

    Efficiency is tokens per second per device, relative to the smallest rung of the curve that runs (the fastest, if
    several layouts share it). `best` marks the fastest of each device count: the line runs through those.
    """
    along = rungs.explode("families")
    several = along.groupby("name")["families"].transform("nunique") > 1
    along["ladder"] = along["name"].where(~several, along["name"] + " · " + along["families"])
    along["curve"] = along["kind"] + " · " + along["ladder"]
    along = along.sort_values(["n_devices", "tokens_per_s"], ascending=[True, False], kind="stable")
    base = along[(along["verdict"] == "") & along["tokens_per_s"].notna()].groupby("curve")
    along["base_devices"] = along["curve"].map(base["n_devices"].first())
    along["efficiency"] = along["tokens_per_s_per_device"] / along["curve"].map(base["tokens_per_s_per_device"].first())
    along.loc[along["verdict"] != "", "efficiency"] = float("nan")
    along["best"] = ~along.duplicated(["curve", "n_devices"])
    return along


def pairs(rungs: Frame) -> Frame:
    """Rungs that were both measured and forecast; `error` is forecast over measured step time, less one."""
    runs = rungs[rungs["step_s"].notna()]
    sides = {kind: runs[runs["kind"] == kind] for kind in ("measured", "forecast")}
    both = sides["measured"].merge(sides["forecast"], on="rung", suffixes=("", "_forecast"))
    return both.assign(error=both["step_s_forecast"] / both["step_s"] - 1)


def _row(record: Record) -> dict[str, Any]:
    step, mfu, memory = (record.get(key) or {} for key in ("step_s", "mfu", "memory_bytes"))
    layout = record["layout"]
    asked = "global_batch_seqs" if record["scaling"] == "strong" else "micro_batch_seqs"
    batch = (record.get("config") or {}).get(asked)
    return {
        "rung": rung_key(record | {"kind": ""}),
        **{key: record[key] for key in ("kind", "preset", "device", "n_devices", "scaling", "seq_len")},
        "precision": layout.get("precision") or "",
        "remat": layout.get("remat") or "",
        "microbatches": layout.get("microbatches"),
        "batch": f"{asked.removesuffix('_batch_seqs')} batch {batch}" if batch else "",
        "global_batch_seqs": record.get("global_batch_seqs"),
        "layout": layout_text(layout),
        "family": "+".join(sorted(name for name in chosen(layout) if name != "data")) or "data",
        "step_s": step.get("median"),
        "step_low_s": step.get("low"),
        "step_high_s": step.get("high"),
        "tokens_per_s": record.get("tokens_per_s"),
        "tokens_per_s_per_device": record.get("tokens_per_s_per_device"),
        "mfu_full": mfu.get("full"),
        "mfu_causal": mfu.get("causal"),
        "hfu": record.get("hfu"),
        "memory_bytes": memory.get("total"),
        "limit_bytes": memory.get("limit"),
        "memory": {k: v for k, v in memory.items() if k not in ("total", "limit") and v},
        "breakdown_s": record.get("breakdown_s") or {},
        "hidden_s": record.get("hidden_s") or {},
        "fits": record.get("fits"),
        "verdict": _verdict(record, memory),
        "note": record.get("note") or "",
    }


def _verdict(record: Record, memory: Mapping[str, float]) -> str:
    if record.get("failed"):
        return str(record["failed"])
    if record.get("fits") is not False:
        return ""
    if not (memory.get("total") and memory.get("limit")):
        return "does not fit"
    return f"does not fit: {memory['total'] / 1e9:,.1f} GB per device, limit {memory['limit'] / 1e9:,.1f} GB"


def _price(cost: Mapping[str, Any]) -> dict[str, Any]:
    """One row of `experiments.cost`, flat. What it gives at the median price only is spread as the price is."""
    per_device, run, per_mtok = cost.get("usd_per_device_h") or {}, cost.get("run_usd") or {}, cost.get("usd_per_mtok")
    prices = {key: cost.get(key) for key in PRICES} | {"run_usd": run.get("median")}
    prices["run_usd_with_failures"] = (cost.get("run_usd_with_failures") or {}).get("median")
    for end in ("low", "high"):
        known = per_device and per_mtok is not None
        prices[f"usd_per_mtok_{end}"] = per_mtok * per_device[end] / per_device["median"] if known else None
        prices[f"run_usd_{end}"] = run.get(end)
        for name in ("run_goodput", "run_days"):
            prices[f"{name}_{end}"] = (cost.get(f"{name}_simulated") or {}).get(end)
    prices |= {"run_shares": cost.get("run_shares") or {}, "run_rests_on": cost.get("run_rests_on") or []}
    prices |= {"run_why_not": cost.get("run_why_not") or ""}
    return prices | {"why_not": cost.get("why_not") or "", "price_sources": cost.get("price_sources") or []}


def _variants(records: Sequence[Record]) -> list[str]:
    """Per record, the model's values that differ among the records of its preset: overridden models told apart."""
    values: dict[tuple[str, str], set[str]] = defaultdict(set)
    for record in records:
        for key, value in record["model"].items():
            values[record["preset"], key].add(repr(value))
    return [
        ", ".join(f"{k}={v}" for k, v in record["model"].items() if len(values[record["preset"], k]) > 1)
        for record in records
    ]


def _families(rungs: Frame) -> list[list[str]]:
    """Per rung the families whose curves it is on: its own, or for a single device every one it opens."""
    keys = list(rungs[["kind", *SAME]].itertuples(index=False, name=None))
    opened: dict[Any, set[str]] = defaultdict(set)
    for key, n_devices, family in zip(keys, rungs["n_devices"], rungs["family"], strict=True):
        if n_devices > 1:
            opened[key].add(family)
    return [
        sorted(opened[key]) if n_devices == 1 and opened[key] else [family]
        for key, n_devices, family in zip(keys, rungs["n_devices"], rungs["family"], strict=True)
    ]


def _names(rungs: Frame) -> list[str]:
    """Per rung the name of its ladder: preset, device and scaling, and whatever else tells it from its neighbours."""
    first = ["preset", "device", "scaling"]
    shown = rungs[first].astype(str)
    for column in (c for c in SAME if c not in first):
        several = rungs.groupby(first)[column].transform("nunique") > 1
        words = {"seq_len": "length ", "remat": "remat "}.get(column, "")
        shown[column] = (words + rungs[column].astype(str)).where(several, "")
    return [" · ".join(filter(None, row)) for row in shown.itertuples(index=False, name=None)]
