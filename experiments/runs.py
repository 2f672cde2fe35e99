"""From a record to its whole run with failures: what it meets, how long it takes, where the time goes.

A rung's rate is that of undisturbed training; `experiments.goodput` says how much of the time that is. Numbers are
those of [reliability] in hardware.toml, over them a facts file's, over them the flags of `Asked`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from experiments import entry, goodput
from experiments.hardware import Device
from experiments.records import Record
from experiments.upkeep import Reliability
from transformer.errors import RequestError

MOST_FAILURES = 20_000  # of a run that is simulated: beyond, the range is narrower than any of its inputs is known
DAY_S = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How a whole run is kept going. None is what the facts say, or what is best."""

    failures_per_device_day: float | None = entry.flag(None, "whatever stops the job, per device as JAX counts it")
    restart_s: float | None = entry.flag(None, "seconds from a failure to the next step")
    checkpoint: Literal["async", "sync"] = entry.flag("async", "written behind training, or while it waits")
    checkpoint_s: float | None = entry.flag(None, "seconds until a checkpoint is safe, instead of its bytes at a rate")
    checkpoint_bytes_per_s: float | None = entry.flag(None, "what storage takes of all nodes together")
    checkpoint_interval_s: float | None = entry.flag(None, "training between two checkpoints; left out: the best")
    spare_nodes: int | None = entry.flag(None, "nodes that wait for others to fail; left out: the cheapest number")
    runs: int = entry.flag(100, "simulated runs, for the range; 0 for none")
    seed: int = entry.flag(0, "of the simulated runs")

    def __post_init__(self) -> None:
        for f in fields(Asked):
            value, least = getattr(self, f.name), _LEAST.get(f.name)
            if isinstance(value, str) or value is None or (math.isfinite(value) and value > 0):
                continue
            if least is None or value != least:
                wanted = "a number above 0" if least is None else f"{least} or more"
                raise RequestError(f"--{f.name}={value:g}: expected {wanted}")


_LEAST = {"spare_nodes": 0, "runs": 0, "seed": 0}


def row(record: Record, device: Device, known: Reliability, asked: Asked, work_s: float) -> dict[str, Any]:
    """Keys `run_*` of the whole run with failures; `run_why_not` is None, or why there are none.

    `work_s` is the run without failures. Simulated ones are `{"low", "mean", "high"}`, 80 % of the runs between.
    RequestError: an interval shorter than a checkpoint takes.
    """
    n_devices = record["n_devices"]
    rate = asked.failures_per_device_day or _rate(device, known)
    bytes_ = checkpoint_bytes(record)
    if rate is None:
        return {"run_why_not": f"no failure rate of {device.slug} is known: give --failures_per_device_day"}
    if bytes_ is None and asked.checkpoint_s is None:
        return {"run_why_not": "the record has no bytes of the optimizer: give --checkpoint_s"}
    per_node = device.per_jax_device().devices_per_node or 1
    run = _run(math.ceil(n_devices / per_node), n_devices * rate / DAY_S, bytes_ or 0.0, known, asked)
    if goodput.closed_form(replace(run, node_loss_share=0.0)).goodput < 0.01:
        between = f"a failure every {1 / run.failures_per_s:,.0f} s, a restart of {run.restart_s:,.0f} s"
        return {"run_why_not": f"does not get on: {between}, a checkpoint safe after {run.write_s:,.0f} s"}
    if asked.spare_nodes is None:
        run = replace(run, spare_nodes=goodput.cheapest_spares(run))
    shares = goodput.closed_form(run)
    wall_s = work_s / shares.goodput
    n_failures = run.failures_per_s * (1 - shares.waiting_for_nodes) * wall_s
    simulated = None
    if asked.runs and n_failures <= MOST_FAILURES:
        simulated = goodput.simulate(run, work_s, repeats=asked.runs, seed=asked.seed)
    return {
        "run_goodput": shares.goodput,
        "run_goodput_simulated": None if simulated is None else _range(work_s / simulated),
        "run_shares": shares._asdict(),
        "run_failures": n_failures,
        "run_checkpoint_bytes": bytes_,
        "run_checkpoint_s": run.write_s,
        "run_interval_s": run.interval_s,
        "run_interval_simulated_s": goodput.simulated_interval_s(run, seed=asked.seed),
        "run_spare_nodes": run.spare_nodes,
        "run_spare_devices": run.spare_nodes * per_node,
        "run_days_with_failures": wall_s / DAY_S,
        "run_days_simulated": None if simulated is None else _range(simulated / DAY_S),
        "run_rests_on": list(_rests_on(device, known, asked)),
        "run_why_not": None,
    }


def checkpoint_bytes(record: Record) -> float | None:
    """Parameters and AdamW's two moments, all float32, once: the moments are always split over all but replicas."""
    moments = (record.get("memory_bytes") or {}).get("optimizer")
    replicas = math.prod(record["layout"].get(axis, 1) for axis in ("slice", "data"))
    return 1.5 * moments * record["n_devices"] / replicas if moments else None


def _rate(device: Device, known: Reliability) -> float | None:
    """Failures a day of one device as JAX counts it."""
    of_a_chip = known.failures_per_device_day.get(device.platform)
    return None if of_a_chip is None else of_a_chip / device.jax_devices_per_chip


def _run(n_nodes: int, failures_per_s: float, bytes_: float, known: Reliability, asked: Asked) -> goodput.Run:
    storage = asked.checkpoint_bytes_per_s or min(n_nodes * known.node_write_bytes_per_s, known.storage_bytes_per_s)
    write_s = asked.checkpoint_s or bytes_ / storage
    run = goodput.Run(
        n_nodes=n_nodes,
        failures_per_s=failures_per_s,
        restart_s=asked.restart_s or known.restart_s,
        stall_s=write_s if asked.checkpoint == "sync" else min(known.checkpoint_stall_s, write_s),
        write_s=write_s,
        interval_s=asked.checkpoint_interval_s or 0.0,
        node_loss_share=known.node_loss_share,
        repair_s=known.repair_s,
        spare_nodes=asked.spare_nodes or 0,
        slow_per_s=n_nodes * known.slow_nodes_per_node_day / DAY_S,
        slow_s=known.slow_s,
        slow_step_share=known.slow_step_share,
    )
    if asked.checkpoint_interval_s is None:
        return replace(run, interval_s=goodput.best_interval_s(run))
    if run.interval_s < run.lag_s:
        raise RequestError(
            f"--checkpoint_interval_s={run.interval_s:g}: a checkpoint of {n_nodes:,} nodes is safe after "
            f"{run.write_s:.4g} s, and the next cannot begin before; at least {math.ceil(run.lag_s)}"
        )
    return run


def _range(values: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(values, (0.1, 0.9))
    return {"low": float(low), "mean": float(values.mean()), "high": float(high)}


def _rests_on(device: Device, known: Reliability, asked: Asked) -> Iterator[dict[str, Any]]:
    """Every number of `known` that was used, with its source."""
    own = {f.name: getattr(asked, f.name) for f in fields(Asked)}
    for key, fact in known.sources.items():
        name, _, platform = key.partition(".")
        flag = {"storage_bytes_per_s": "checkpoint_bytes_per_s"}.get(name, name)
        if platform not in ("", device.platform):
            continue
        if own.get(flag) is not None:
            yield {"name": name, "value": own[flag], "source": f"--{flag}"}
        else:
            told = filter(None, [fact.source, fact.date and f"({fact.date})", fact.note and f"[{fact.note}]"])
            yield {"name": name, "value": fact.value, "source": " ".join(told)}
