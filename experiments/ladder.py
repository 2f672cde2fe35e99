"""Measure the same experiment on one attached device, two, four ...: one record a rung.

    python -m experiments.ladder --preset=tiny --devices=1,2,4,8 --steps=10 --out=runs/ladder

On a machine without accelerators the devices are virtual (JAX_NUM_CPU_DEVICES=8), share its cores, and
the records say so. Takes about a minute there. A rung that fails is recorded as failed; the rest goes on.
"""

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax

from experiments import attached, distributed, entry, records, show
from experiments.config import Rung, TextRunConfig, train_step
from experiments.entry import flag
from experiments.hardware import Device, Facts, load
from experiments.measure import Measurement, measure
from experiments.step import chip_of
from transformer.accounting import hardware_flops_per_token, mfu_peak
from transformer.backends import Chip
from transformer.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class LadderRequest(TextRunConfig):
    """`python -m experiments.ladder`"""

    devices: tuple[int, ...] = flag((1,), "device counts, the rungs, with commas between")
    steps: int = flag(10, "timed steps of a rung")
    warmup_steps: int = flag(2, "steps before them that are not timed")
    out: str = flag("runs/ladder", "the folder for records.jsonl")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "warmup_steps"):
            if getattr(self, name) < (name == "steps"):
                raise RequestError(f"--{name}={getattr(self, name)}: expected at least {int(name == 'steps')}")
        if not self.devices:
            raise RequestError("--devices is empty: expected counts such as 1,2,4,8")


def main(request: LadderRequest) -> int:
    attached.look_for_what_is_there()
    distributed.join()
    records.check_out(Path(request.out))
    facts = load(request.facts)
    request.check_rate(facts.by_jax_kind(_kind()))
    rungs = [request.rung(n) for n in request.devices]  # what is wrong with the request is said before any work
    n_attached = jax.device_count()
    if max(request.devices) > n_attached:
        hint = f"; for virtual ones set JAX_NUM_CPU_DEVICES={max(request.devices)}" if _virtual() else ""
        raise RequestError(f"--devices={max(request.devices)}: {n_attached} devices are attached{hint}")
    if jax.process_count() > 1 and set(request.devices) != {n_attached}:
        raise RequestError(f"--devices: a job of {jax.process_count()} processes measures all its {n_attached} devices")
    for remark in request.remarks(_chip(), rungs[0].layout):  # raises before any work
        show.remark(remark)

    done = []
    with show.Progress(f"{request.preset} on {_kind()}", total=len(rungs)) as progress:
        for rung in rungs:
            record = measure_rung(request, rung, facts, progress)
            if distributed.is_lead():
                records.append(Path(request.out), record)
            done.append(record)
            if record["failed"] and not rung.failed and jax.process_count() > 1:
                raise RuntimeError(record["failed"])  # die, so that peers in a collective learn of it
    if distributed.is_lead():
        show.table(done, as_json=request.json)
        print(f"{len(done)} records in {Path(request.out) / records.FILE}", file=sys.stderr)
    return 1 if any(r["failed"] for r in done) else 0


def measure_rung(request: LadderRequest, rung: Rung, facts: Facts, progress: "show.Progress") -> records.Record:
    """One rung's record, measured or failed."""
    known = facts.by_jax_kind(_kind())
    device = known.per_jax_device() if known else None
    record = request.record(rung, kind="measured", device=device.slug if device else _kind(), chip=_chip())
    record |= {"device_kind": _kind(), "note": _note(rung.n_devices)}
    if rung.failed:
        return record
    try:
        with progress.rung(f"{rung.n_devices} devices", request.warmup_steps + request.steps) as advance:
            seen = _measure(request, rung, advance)
    except RequestError:
        raise
    except Exception as error:  # whatever stops a rung is its result; the ladder goes on
        return record | {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return record | _results(request, rung, seen, device)


def _measure(request: LadderRequest, rung: Rung, advance: "show.Advance") -> Measurement:
    step = train_step(request, rung, jax.devices())
    tokens = rung.global_batch_seqs * request.length

    def batches() -> Iterator[dict[str, jax.Array]]:
        rows = request.batches(rung, step, "train")
        return (step.place(batch, rung.global_batch_seqs) for batch in rows)

    seen = measure(
        step, batches(), warmup=request.warmup_steps, steps=request.steps, seed=request.seed,
        on_step=lambda i, seconds: advance(f"{tokens / seconds:,.0f} tokens/s"),
    )  # fmt: skip
    if not math.isfinite(seen.loss):
        raise FloatingPointError(f"loss is {seen.loss} after {request.warmup_steps + request.steps} steps")
    return seen


def _results(request: LadderRequest, rung: Rung, seen: Measurement, device: Device | None) -> records.Record:
    step_s = seen.summary_s()
    backend, _ = request.resolved_attention(_chip(), rung.layout)
    peak = device.compute_peak(mfu_peak(request.resolved_precision(_chip().platform))) if device else None
    flops = hardware_flops_per_token(
        request.resolved_model, request.length, request.remat, backend, rung.micro_batch_seqs,
        request.resolved_experts(_chip(), rung.layout)[0],
    )  # fmt: skip
    limit = device.usable_bytes if device else None
    return {
        "step_s": step_s,
        "compile_s": seen.compile_s,
        "compile_kept": seen.compile_kept,
        "warnings": seen.warnings,
        **request.speed(rung, step_s["median"], peak),
        "hfu": request.used(rung, step_s["median"], peak, flops),
        "memory_bytes": seen.memory_bytes | {"limit": limit},
        "peak_bytes": seen.peak_bytes,
        "fits": True,  # it ran
        "energy_j": device.energy_j(step_s["median"], rung.n_devices) if device else None,
        "loss": seen.loss,
    }


def _kind() -> str:
    return jax.devices()[0].device_kind


def _chip() -> Chip:
    return chip_of(jax.devices()[0])


def _virtual() -> bool:
    return _chip().platform == "cpu"


def _note(n_devices: int) -> str | None:
    """What a reader of a virtual rung must know: its devices are threads on the cores that there are."""
    if not _virtual() or n_devices == 1:
        return None
    return f"virtual devices that share {os.cpu_count()} cores: this shows that the program runs, not that it scales"


if __name__ == "__main__":
    entry.start(main, LadderRequest)
