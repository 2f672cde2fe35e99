"""Measure what the attached devices do alone, for forecasts to rest on: a dated facts file.

    python -m experiments.calibrate --out=runs/calibrate
    python -m experiments.forecast --device=h100-sxm --devices=64 --facts=runs/calibrate/calibration.toml

Products over shapes, elementwise passes, attention, launches, collectives over all attached devices, watts where
nvidia-smi is. Takes under five minutes on a GPU, about two on a CPU; on a busy machine the numbers are of a busy
machine. On one without accelerators, JAX_NUM_CPU_DEVICES=8 has collectives measured between virtual devices.
"""

import dataclasses
import datetime
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import attached, entry, primitives, records, show
from experiments.entry import flag
from experiments.forecast import constants
from experiments.forecast.kernels import seen_pairs
from experiments.forecast.rates import Rates
from experiments.hardware import Device, load
from experiments.primitives import Timing
from experiments.step import chip_of
from transformer.errors import RequestError

FILE = "calibration.toml"


class Plan(NamedTuple):
    """What is measured on a platform. Sides are of square-ish products, each with each."""

    dtypes: tuple[str, ...]
    sides: tuple[int, ...]
    heads: tuple[tuple[int, int, int], ...]  # batch, length, head size: products of attention that is not fused
    pass_bytes: tuple[int, ...]
    attention: tuple[int, int, int]  # length, heads, head size
    message_bytes: tuple[int, ...]
    soak_s: float  # work before anything is timed, so that clocks have settled
    by_class: bool = False  # operations beside products too, and memory given anew: on a CPU memory does not limit all


PLANS = {
    "gpu": Plan(
        dtypes=("bf16", "fp8"), sides=(256, 1024, 4096, 16384), heads=((256, 1024, 64), (64, 2048, 128)),
        pass_bytes=(1 << 20, 1 << 24, 1 << 30), attention=(8192, 16, 128),
        message_bytes=(1 << 12, 1 << 20, 1 << 24, 1 << 28), soak_s=10.0,
    ),
    "tpu": Plan(
        dtypes=("bf16",), sides=(256, 1024, 4096, 8192), heads=((256, 1024, 64), (64, 2048, 128)),
        pass_bytes=(1 << 20, 1 << 24, 1 << 29), attention=(4096, 16, 128),
        message_bytes=(1 << 12, 1 << 20, 1 << 24, 1 << 28), soak_s=2.0,
    ),
    "cpu": Plan(
        dtypes=("f32",), sides=(64, 256, 1024), heads=((64, 64, 16), (64, 64, 64), (32, 256, 64)),
        pass_bytes=(1 << 17, 1 << 20, *(n << 23 for n in (1, 2, 3, 4, 6, 8, 32))), attention=(512, 4, 64),
        message_bytes=(1 << 12, 1 << 20, 1 << 24), soak_s=0.5, by_class=True,
    ),
}  # fmt: skip

_JAX = {"bf16": jnp.bfloat16, "f32": jnp.float32, "fp8": jnp.float8_e4m3fn}
_XLA = {"bf16": "bf16", "f32": "f32", "fp8": "f8e4m3fn"}


@dataclass(frozen=True, kw_only=True)
class CalibrateRequest:
    """`python -m experiments.calibrate`"""

    out: str = flag("runs/calibrate", f"the folder for {FILE}")
    facts: str | None = flag(None, "a TOML file of facts of your own, as in docs/facts.md")
    largest: int = flag(0, "leave out products with a longer side; 0 for the platform's own choice")
    loop_s: float = flag(0.1, "seconds that each timed loop runs")
    loops: int = flag(5, "timed loops that each number is the median of")

    def __post_init__(self) -> None:
        if self.largest and self.largest < 64:
            raise RequestError(f"--largest={self.largest}: expected 64 or more, or 0")
        if self.loop_s <= 0:
            raise RequestError(f"--loop_s={self.loop_s}: expected seconds above 0")
        if self.loops < 1:
            raise RequestError(f"--loops={self.loops}: expected at least 1")


def main(request: CalibrateRequest) -> int:
    attached.look_for_what_is_there()
    out = Path(request.out)
    records.check_out(out)
    kind = jax.devices()[0].device_kind
    device = load(request.facts).by_jax_kind(kind)
    if device is None:
        raise RequestError(f"no facts about {kind!r}: describe it in a file and pass --facts, as docs/facts.md says")
    device = device.per_jax_device()
    plan = PLANS[device.platform]
    if request.largest:
        plan = plan._replace(sides=tuple(side for side in plan.sides if side <= request.largest))
    found = dict(measured(device, plan, Timing(request.loop_s, request.loops)))
    records.write_whole(out / FILE, text_of(device, kind, found))
    print(f"{len(found)} facts of {device.slug} in {out / FILE}: pass it with --facts", file=sys.stderr)
    return 0


def measured(device: Device, plan: Plan, timing: Timing) -> Iterator[tuple[str, Any]]:
    """Facts of `device` by their names in hardware.toml, as they are measured. Products come after work that settled
    the clocks, so they need no limit by watts (`products.sustained_flops_per_s`)."""
    chip = chip_of(jax.devices()[0])
    has_fp8 = chip.generation is None or chip.generation >= (8, 9)
    dtypes = [dtype for dtype in plan.dtypes if dtype != "fp8" or has_fp8]
    settle(plan, dtypes[0])
    rate = 0.0
    for dtype in dtypes:
        rows = products(plan, dtype, timing)
        best = max(2 * math.prod(sizes) / seconds for *sizes, seconds in rows)
        rate = rate or best
        yield f"measured_products.{dtype}", rows
        yield f"measured_matmul_flops_per_s.{dtype}", best
        if dtype not in device.peak_flops_per_s:
            yield f"peak_flops_per_s.{dtype}", best
            yield "matmul_efficiency", 1.0
        if plan.by_class:
            yield f"measured_turned_products.{dtype}", products(plan, dtype, timing, turned=True)
    yield from passes(device, plan, timing)
    if plan.by_class:
        yield from operations(timing)
    show.remark("launch")
    yield "launch_s", primitives.launch_s(timing)
    yield from attention(device, plan, dtypes[0], rate, timing)
    if len(jax.devices()) > 1:
        yield from collectives(device, plan, timing)
    side, dtype = plan.sides[-1], _JAX[dtypes[0]]
    drawn = primitives.watts(5.0, lambda: primitives.product_s(side, side, side, 1, dtype, Timing(0.5, 1)))
    if drawn is not None:
        yield "tdp_w", drawn


def settle(plan: Plan, dtype: str) -> None:
    show.remark("settling clocks")
    side = plan.sides[-1]
    primitives.product_s(side, side, side, 1, _JAX[dtype], Timing(plan.soak_s, 1))


def products(plan: Plan, dtype: str, timing: Timing, *, turned: bool = False) -> list[list[float]]:
    """Rows of m, n, k, batch and seconds: every combination of sides, and batches as attention without a kernel has
    them: scores, and what they weigh; none of these are `turned`."""
    shapes = [(m, n, k, 1) for m in plan.sides for n in plan.sides for k in plan.sides]
    for batch, length, head in () if turned else plan.heads:
        shapes += [(length, length, head, batch), (length, head, length, batch)]
    rows = []
    name = f"{dtype}, turned" if turned else dtype
    with show.Progress("products", total=1) as progress, progress.rung(name, len(shapes)) as advance:
        for m, n, k, batch in shapes:
            seconds = primitives.product_s(m, n, k, batch, _JAX[dtype], timing, turned=turned)
            rows.append([m, n, k, batch, seconds])
            advance(f"{2 * m * n * k * batch / seconds / 1e12:.3g} TFLOP/s")
    return rows


def passes(device: Device, plan: Plan, timing: Timing) -> Iterator[tuple[str, Any]]:
    """The largest is of memory; a smaller one that is a third faster was in the cache."""
    show.remark("elementwise passes")
    rates = {n: n / primitives.pass_s(n, timing) for n in plan.pass_bytes}
    far = rates[max(rates)]
    if device.hbm_bytes_per_s is None:
        yield "hbm_bytes_per_s", far
        yield "memory_efficiency", 1.0
    else:
        yield "memory_efficiency", min(1.0, far / device.hbm_bytes_per_s)
    near = [n for n, rate in rates.items() if rate > 4 / 3 * far]
    if near:
        yield "l2_bytes", float(2 * max(near))  # of which half serves a pass (`Rates.memory_s`)
        yield "l2_bytes_per_s", float(np.median([rates[n] for n in near]))


def operations(timing: Timing) -> Iterator[tuple[str, Any]]:
    """Seconds an element of each class, the mean of what it is measured by; and the rate at which memory is given."""
    show.remark("operations")
    for name, kinds in primitives.OPERATIONS.items():
        seconds = [primitives.operation_s(kind, timing) / math.prod(kind.shape) / kind.n_times for kind in kinds]
        yield f"operation_s.{name}", float(np.mean(seconds))
    n_bytes = int(4 * constants.KEPT_BYTES.value)
    yield "fresh_bytes_per_s", n_bytes / primitives.fresh_s(n_bytes, timing)


def attention(device: Device, plan: Plan, dtype: str, rate: float, timing: Timing) -> Iterator[tuple[str, Any]]:
    """Efficiency of the forward kernel, such that forward and backward together take what they took."""
    show.remark("attention")
    length, heads, head = plan.attention
    pairs = seen_pairs(length, length)
    seconds = primitives.attention_s(length, heads, head, _JAX[dtype], backward=True, timing=timing)
    peak = device.peak_flops_per_s.get(dtype, rate)
    known = {"peak_flops_per_s": {dtype: peak}, "attention_efficiency": 1.0}
    ideal = Rates(dataclasses.replace(device, **known)).attention_s(
        7 * 2 * pairs * heads * head, _XLA[dtype], head=head, length=length
    )
    yield "attention_efficiency", min(1.0, ideal / seconds)


def collectives(device: Device, plan: Plan, timing: Timing) -> Iterator[tuple[str, Any]]:
    """Launch and latency from the smallest all-gathers over two devices and over all; bandwidth from the largest."""
    show.remark("collectives")
    devices, sizes = jax.devices(), plan.message_bytes
    g = len(devices)

    def gather_s(n_bytes: int, n: int) -> float:
        return primitives.collective_s("all-gather", n_bytes, devices[:n], timing)

    small_s, large_s = gather_s(min(sizes), g), gather_s(max(sizes), g)
    two_s = gather_s(min(sizes), 2) if g > 2 else small_s
    hop_s = max(0.0, small_s - two_s) / max(1, g - 2)
    yield "link_latency_s", hop_s
    yield "collective_launch_s", max(0.0, two_s - hop_s)
    own = constants.LOCAL_COPY.value if device.sm_count else 0.0
    bytes_per_s = (g - 1 + own) / g * max(sizes) / max(large_s - small_s, 1e-9)
    published = device.link_bytes_per_s or (device.ici_bytes_per_s or 0) * (device.ici_links or 0)
    if published:
        yield "link_efficiency", min(1.0, bytes_per_s / published)
    else:
        yield "link_bytes_per_s", bytes_per_s
        yield "link_efficiency", 1.0


def text_of(device: Device, kind: str, found: dict[str, Any]) -> str:
    """The facts file."""
    made = records.provenance()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    jax_version, commit = made["versions"]["jax"], made["commit"]
    cite = f"experiments.calibrate on {len(jax.devices())} x {kind}, JAX {jax_version}, commit {commit}"
    lines = [f"# {made['command']}", "[sources]", f'calibration = {{ cite = "{cite}", date = "{today}" }}', ""]
    lines.append(f"[devices.{device.slug}]")
    lines += [f'{name} = {{ value = {_written(value)}, source = "calibration" }}' for name, value in found.items()]
    return "\n".join(lines) + "\n"


def _written(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_written(item) for item in value) + "]"
    return repr(float(np.format_float_scientific(value, precision=4))) if isinstance(value, float) else str(value)


if __name__ == "__main__":
    entry.start(main, CalibrateRequest)
