"""One rung that is not attached: the train step compiled for it, its schedule simulated, its record."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from experiments import memory
from experiments.compiler import COMPILER_OPTIONS, NO_TRITON
from experiments.config import RunConfig, Rung, train_step
from experiments.forecast import constants, hlo, interval, trace
from experiments.forecast.network import Fabric, fact
from experiments.forecast.program import program
from experiments.forecast.rates import Rates
from experiments.forecast.simulate import Simulator
from experiments.forecast.timeline import Timeline
from experiments.forecast.topology import keep_in_host
from experiments.forecast.traffic import compared
from experiments.hardware import Device
from experiments.records import Record
from experiments.show import Advance
from experiments.step import TrainStep, chip_of
from transformer.accounting import mfu_peak
from transformer.communication import Step, by_axis
from transformer.config import Precision
from transformer.errors import RequestError

CITED = (
    "peak_flops_per_s", "hbm_bytes", "reserve_bytes", "hbm_bytes_per_s", "l2_bytes", "l2_bytes_per_s", "sm_count",
    "clock_hz", "launch_s", "operation_s", "fresh_bytes_per_s", "host_bytes_per_s", "scaleup_devices",
    "switch_reduces", "link_bytes_per_s", "link_latency_s", "collective_launch_s", "nic_bytes_per_s", "nic_latency_s",
    "oversubscription", "ici_links", "ici_bytes_per_s", "matmul_efficiency", "memory_efficiency", "link_efficiency",
    "attention_efficiency", "tdp_w", "system_w",
)  # fmt: skip


ABSENT = {"gpu": {"xla_gpu_autotune_level": 0}, "tpu": {}, "cpu": {}}
"""Options beside those of a real run: no kernels are compiled to be timed, for there is nothing to time them on.
The schedule has the same kernels with and without, and on JAX 0.12 compiles in two thirds of the time."""


def forecast(
    run: RunConfig,
    rung: Rung,
    device: Device,
    cluster: Sequence[jax.Device],
    advance: Advance,
    trace_to: Path | None = None,
) -> Record:
    """The rung's record. What the compiler refuses is a failed record with its reason. With `trace_to` the step's
    timeline is written there."""
    device = device.per_jax_device()
    chip = chip_of(cluster[0])
    platform = chip.platform
    record = run.record(rung, kind="forecast", device=device.slug, chip=chip)
    record |= {"method": "simulated", "compiled_for": cluster[0].device_kind}
    if rung.failed:
        return record
    step = train_step(run, rung, list(cluster))
    started = time.perf_counter()
    try:
        lowered = step.step.lower(step.abstract_state, step.abstract_batch(rung.global_batch_seqs, run.length))
        if run.offload_optimizer and platform == "gpu":
            arrays = zip(jax.tree.leaves(step.abstract_state), jax.tree.leaves(step.in_host), strict=True)
            keep_in_host(lowered, [(a.ndim, hosted) for a, hosted in arrays])
        options = {**COMPILER_OPTIONS[platform], **ABSENT[platform]}
        made, kept = program(lowered, options, cluster)
    except RequestError:
        raise
    except Exception as error:  # out of memory on TPUs is a compiler error, and the rung's result
        fits = False if "RESOURCE_EXHAUSTED" in str(error) else None
        return record | {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "fits": fits}
    compile_s = time.perf_counter() - started
    advance("compiled")
    simulator = Simulator(
        hlo.parse(made.text), Rates(device), _fabric(device, step.mesh), rung.layout, rung.microbatches,
        held=constants.NCCL_CHANNELS.value / device.sm_count if device.sm_count else 0.0,
        fresh_bytes=float(made.memory.temp_size_in_bytes),
    )  # fmt: skip
    timeline = simulator.run(trace=trace_to is not None)
    if trace_to is not None:
        trace.write(trace_to, timeline, f"forecast: {run.preset} on {rung.n_devices:,} {device.slug}")
    advance("simulated")
    found = _results(run, rung, device, timeline) | _memory(made.memory, step, device)
    near = _range(run, rung, device)
    found["step_s"] = near.around(timeline.compute_s)
    rests_on = {"facts": device.cited(*CITED), "assumed": _assumed(device, timeline, near, made.options)}
    if record["layout"].get("experts") == "grouped":
        rests_on["assumed"]["experts"] = "their kernels at the rates of cuBLAS's batched products: they were not timed"
    told = {"compile_s": compile_s, "compile_kept": kept, "warnings": made.warnings}
    return record | told | found | rests_on


def _fabric(device: Device, mesh: jax.sharding.Mesh) -> Fabric:
    if device.platform != "tpu":
        return Fabric(device)
    devices = list(mesh.devices.flat)
    slices = tuple(getattr(d, "slice_index", 0) for d in devices)
    return Fabric(device, tuple(tuple(d.coords) for d in devices), slices)


def _results(run: RunConfig, rung: Rung, device: Device, timeline: Timeline) -> Record:
    step_s = timeline.compute_s
    tokens = rung.global_batch_seqs * run.length
    precision = run.resolved_precision(device.platform)
    rate = Rates(device).peak(mfu_peak(precision))

    flops = sum(timeline.flops.values()) * rung.n_devices / tokens  # of a token, as the program runs
    return {
        **run.speed(rung, step_s, rate),
        "hfu": run.used(rung, step_s, rate, flops),
        "hardware_flops_per_token": flops,
        "breakdown_s": {k: v for k, v in sorted(timeline.breakdown_s.items()) if v},
        "collective_bytes": dict(sorted(timeline.collective_bytes.items())),
        "collectives": compared(timeline.collective_bytes, _closed_form(run, rung, precision)),
        "hidden_s": {k: v for k, v in sorted(timeline.hidden_s.items()) if v > 1e-9},
        "energy_j": device.energy_j(step_s, rung.n_devices),
    }


def _range(run: RunConfig, rung: Rung, device: Device) -> interval.Range:
    """Of the group nearest to our own program: what other programs in JAX are."""
    layered = rung.layout.context > 1 or bool(run.resolved_model.n_experts)
    return interval.published().range_of(interval.Standing(device.slug, "xla", rung.n_devices, layered))


def _closed_form(run: RunConfig, rung: Rung, precision: Precision) -> Mapping[str, float]:
    return by_axis(
        Step(
            config=run.resolved_model, layout=rung.layout, remat=run.remat, precision=precision,
            microbatches=rung.microbatches, micro_batch_seqs=rung.micro_batch_seqs, seq_len=run.length,
        ).collectives()
    )  # fmt: skip


def _memory(stats: memory.Stats, step: TrainStep, device: Device) -> Record:
    classes = memory.by_class(stats, step)
    if device.platform == "cpu" and device.hbm_bytes is None:  # whatever was bought
        return {"memory_bytes": classes | {"limit": None}, "fits": None}
    limit = int(fact(device, "hbm_bytes") - (device.reserve_bytes or 0))
    return {"memory_bytes": classes | {"limit": limit}, "fits": classes["total"] <= limit}


def _assumed(device: Device, timeline: Timeline, near: interval.Range, options: Record) -> Record:
    """What the record rests on beside the device's facts: constants of the model, and what it cannot know."""
    platform = device.platform
    f32_is_known = platform != "gpu" or not {"tf32", "f32"}.isdisjoint(device.peak_flops_per_s)
    return {
        "launch_s": Rates(device).launch_s,
        "compiler_options": options,
        "kernels": "chosen without autotuning, for no device was there to time them on"
        + ("; cuBLAS's, for XLA cannot tile all products" if NO_TRITON.items() <= options.items() else ""),
        "step_s_range": f"over and times {1 + near.half_width:.3f}, by analogy: {near.reason}; those runs are of other "
        "programs and forecast in closed form, this one is our own and simulated",
        "f32_products": "at the published rate" if f32_is_known else "at half the bf16 rate: none is published",
        "costed_by_bytes_alone": _unknown(timeline),
    }


def _unknown(timeline: Timeline) -> Record:
    """What is costed by its bytes alone: its part of all bytes. What it multiplies is not known: null."""
    total = sum(timeline.traffic_bytes.values()) or 1.0
    return {
        name: {"share_of_bytes": n_bytes / total, "share_of_flops": None} for name, n_bytes in timeline.unknown.items()
    }
