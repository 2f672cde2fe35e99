"""From a published row to what the closed form is asked, and what of that the source does not print."""

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from experiments.forecast.closed_form.practice import Practice
from experiments.forecast.closed_form.setup import Setup
from experiments.forecast.closed_form.step import ClosedForm, Forecast
from experiments.hardware import Device, Facts
from experiments.validation import words
from experiments.validation.frameworks import XLA, practice_of
from experiments.validation.models import Excused, model_of
from experiments.validation.tables import Row
from transformer.config import ModelConfig
from transformer.errors import RequestError
from transformer.layouts import divisors
from transformer.sharding import Layout


@dataclass(frozen=True, slots=True)
class Case:
    """A row that can be forecast. `choices`: setups that the source leaves open, of which the fastest that fits is
    taken, or if none does the smallest."""

    row: Row
    device: Device
    choices: tuple[Setup, ...]
    assumed: tuple[str, ...]

    def forecast(self, model: ClosedForm) -> tuple[Setup, Forecast]:
        found = [(setup, model.forecast(setup)) for setup in self.choices]
        if len(found) == 1:
            return found[0]
        limit = self.device.usable_bytes or math.inf
        fitting = [(setup, done) for setup, done in found if done.total_bytes <= limit]
        if fitting:
            return min(fitting, key=lambda pair: pair[1].step_s)
        return min(found, key=lambda pair: pair[1].total_bytes)


def case_of(row: Row, facts: Facts) -> Case:
    """The row's case. Excused where it has none; RequestError where a cell is no number."""
    model, assumed = model_of(row)
    device = _device(row, facts, assumed)
    number = words.precision(row.text("precision"))
    if number is None:
        number = words.Number("bf16" if "bf16" in device.peak_flops_per_s else "fp16")
        assumed.append(_said(row, "precision", number.precision))
    if "fp4" in row.text("precision").lower():
        assumed.append("precision=fp8, for no fp4 rates are known")
    if number.precision == "fp8" and "fp8" not in device.peak_flops_per_s:
        number = number._replace(precision="bf16")
        assumed.append("precision=bf16, for the device has no fp8")
    if number.precision == "bf16" and "bf16" not in device.peak_flops_per_s and "fp16" in device.peak_flops_per_s:
        number = number._replace(precision="fp16")
    practice, told = practice_of(row.text("software"), row.text("notes"), row.count("year"), device.platform, number)
    assumed += told
    if model.position == "relative":
        practice = dataclasses.replace(practice, attention="unfused")
    layouts, keeps = _layouts(row, model, device, practice, assumed)
    if keeps:
        practice = dataclasses.replace(practice, reshard_after_forward=False)
    length = row.count("seq_len") or 0
    if model.family == "encoder_decoder":  # the column counts both sides; each stack sees its own
        length = length // 2
    sp = row.text("sp").lower()
    habit = practice.name != XLA.name and _is_recent(row)  # sequences are split over tensor where nothing is said
    notes = row.text("notes").lower()
    shared: dict[str, Any] = {
        "seq_len": length, "precision": number.precision, "practice": practice, "slow_scaling": number.row_scaled,
        "layers_only": model.n_layers == 1 and bool(re.search(r"one layer|single[- ]layer", notes)),
        "adapters_only": "lora" in row.text("model_name").lower(),
        "sequence_parallel": sp in ("yes", "true", "1") or (not sp and habit),
    }  # fmt: skip
    remats = _remats(row, practice, assumed)
    choices = []
    for layout in layouts:
        for micro, n in _microbatches(row, layout, assumed):
            for kind, share in remats:
                choices.append(
                    Setup(model=model, layout=layout, micro_batch_seqs=micro, microbatches=n, remat=cast(Any, kind),
                          remat_share=share, **shared)
                )  # fmt: skip
    whole = row.count("global_batch_seqs")
    if exact := [setup for setup in choices if setup.global_batch_seqs == whole]:
        choices = exact
    elif whole:
        assumed.append(f"global_batch_seqs={choices[0].global_batch_seqs}, and its time scaled to {whole}")
    if practice.name == "fsdp":  # FSDP2 under a pipeline keeps weights and gradients whole over a step's microbatches
        keeps = dataclasses.replace(practice, reshard_after_forward=False, gather_every_microbatch=False)
        choices = [dataclasses.replace(s, practice=keeps) if s.layout.pipeline > 1 else s for s in choices]
    return Case(row, device, tuple(choices), tuple(dict.fromkeys(assumed)))


def _said(row: Row, column: str, taken: object) -> str:
    text = row.text(column)
    return f"{column}={taken}" + (f", for {text!r} is not understood" if text else "")


def _device(row: Row, facts: Facts, assumed: list[str]) -> Device:
    name = row.text("device")
    device = _find(name, facts)
    if device is None:
        raise Excused(f"no facts about device {name!r}")
    changes: dict[str, object] = {}
    per_node = row.count("devices_per_node")
    if device.platform == "gpu":
        if per_node and per_node != device.devices_per_node:
            changes["devices_per_node"] = per_node
            if not device.scaleup_devices or device.scaleup_devices <= 16:
                changes["scaleup_devices"] = per_node
        rate = words.nic_bytes_per_s(row.text("interconnect"), per_node or device.devices_per_node or 8)
        if rate:
            changes["nic_bytes_per_s"] = rate
        elif (row.count("n_devices") or 1) > (per_node or device.devices_per_node or 8):
            assumed.append(f"network={(device.nic_bytes_per_s or 0) * 8e-9:g} Gb/s a device")
    return dataclasses.replace(device, **changes) if changes else device  # pyright: ignore[reportArgumentType]


def _find(name: str, facts: Facts) -> Device | None:
    """By any spelling, else by the longest spelling that the text contains."""
    try:
        return facts.device(name)
    except RequestError:
        plain = re.sub(r"[^a-z0-9]", "", re.sub(r"\(.*?\)", "", name.casefold()))
        known = [slug for slug in facts.slugs if len(slug) >= 4 and slug in plain and slug != "cpu"]
        return facts.devices[facts.slugs[max(known, key=len)]] if known else None


def _layouts(
    row: Row, model: ModelConfig, device: Device, practice: Practice, assumed: list[str]
) -> tuple[list[Layout], bool]:
    n = row.count("n_devices") or 1
    text = row.text("fsdp_zero_stage")
    shard = words.sharding(text)
    if text and shard is None:
        assumed.append(f"sharding, for {text!r} is not understood")
    is_xla = practice.name == XLA.name
    if shard is None:
        splits = _is_recent(row) or practice.name == "megatron-deepspeed"  # the optimizer, by habit
        shard = words.Sharding(3 if is_xla or practice.name in ("fsdp", "deepspeed") else int(splits))
        assumed.append(f"zero={shard.zero}")
    sizes = {axis: row.size(axis) for axis in ("tp", "pp", "cp", "ep", "vpp", "dp")}
    if shard.tensor:
        sizes["tp"] = shard.tensor
    found = []
    for tp, pp in _tensor_and_pipeline(sizes, n, model, device, is_xla, assumed):
        cp = sizes["cp"] or 1
        printed = (tp, pp, cp)
        tp = math.gcd(tp, n)
        pp = math.gcd(pp, n // tp)
        cp = math.gcd(cp, n // tp // pp)
        if (tp, pp, cp) != printed:
            assumed.append(f"tp={tp}, pp={pp}, cp={cp}, for {'x'.join(map(str, printed))} does not divide {n} devices")
        left = n // (tp * pp * cp)
        dp = sizes["dp"]
        if not is_xla and dp is not None and dp != left:
            assumed.append(f"dp={left}, for {dp} x {tp} x {pp} x {cp} devices are not {n}")
        whole = row.count("global_batch_seqs")
        if not is_xla and dp is not None and whole and whole % left and left % dp == 0 and whole % dp == 0:
            assumed.append(f"cp={cp * left // dp}, for {whole} sequences are not of {left} replicas")
            cp, left = cp * left // dp, dp
        if model.n_experts and left % (sizes["ep"] or 1):
            assumed.append(f"ep={math.gcd(sizes['ep'] or 1, left)}, for {sizes['ep']} do not divide {left} replicas")
        found += [
            _layout(row, model, shard, sizes | {"vpp": vpp}, left, tp, pp, cp, is_xla, device)
            for vpp in _repeats(row, practice, model, pp, assumed)
        ]
    return found, shard.keeps or shard.zero == 2


def _is_recent(row: Row) -> bool:
    return (row.count("year") or 2024) >= 2023


def _layout(
    row: Row, model: ModelConfig, shard: words.Sharding, sizes: dict[str, int | None],
    left: int, tp: int, pp: int, cp: int, is_xla: bool, device: Device,
) -> Layout:  # fmt: skip
    """Replicas, fsdp, experts and slices of what tensor, pipeline and context leave."""
    expert = math.gcd(sizes["ep"] or 1, left) if model.n_experts else 1
    left //= expert
    slices, data, fsdp = 1, left, 1
    if shard.zero:
        fsdp = math.gcd(shard.size, left) if shard.size else left
        if shard.hybrid and not shard.size:
            fsdp = math.gcd(left, device.devices_per_node or 8)
        data = left // fsdp
    if is_xla and device.platform == "tpu":
        printed = (
            words.first_number(row.text("interconnect").split(";")[-1]) if "slice" in row.text("interconnect") else None
        )
        slices = math.gcd(int(printed), data) if printed else (sizes["dp"] if "pod" in row.text("dp") else 1) or 1
        slices = math.gcd(slices, data)
        data //= slices
    return Layout(
        slice=slices, pipeline=pp, data=data, fsdp=fsdp, expert=expert, context=cp, tensor=tp,
        zero=shard.zero or 3, repeats=sizes["vpp"] or 1,
    )  # fmt: skip


def _repeats(row: Row, practice: Practice, model: ModelConfig, pp: int, assumed: list[str]) -> list[int]:
    """Parts of the model that a stage has: printed, or of frameworks that interleave by habit all that divide."""
    if pp == 1:
        return [1]
    if printed := row.size("vpp"):
        return [printed]
    if practice.name in ("megatron-core", "nemo"):
        assumed.append("vpp: the fastest that fits")
        per_stage = math.ceil(model.n_layers / pp)
        return [v for v in range(1, min(per_stage, 12) + 1) if per_stage % v == 0]
    vpp = 2 if re.search(r"(?<!no )interleaved", row.text("software").lower()) else 1
    assumed.append(f"vpp={vpp}")
    return [vpp]


def _tensor_and_pipeline(
    sizes: dict[str, int | None], n: int, model: ModelConfig, device: Device, is_xla: bool, assumed: list[str]
) -> list[tuple[int, int]]:
    tp, pp = sizes["tp"], sizes["pp"]
    if tp is not None and pp is not None:
        return [(tp, pp)]
    if is_xla or (tp is None and pp is None and sizes["dp"] is not None):
        assumed.append("tp=1, pp=1")
        return [(tp or 1, pp or 1)]
    assumed.append("tp and pp: the fastest that fit")
    tps = [tp] if tp else [t for t in (1, 2, 4, 8) if model.n_heads % t == 0 and t <= (device.devices_per_node or 8)]
    pps = [pp] if pp else [p for p in (1, 2, 4, 8, 16) if model.n_layers % p == 0]
    return [(t, p) for t in tps for p in pps if n % (t * p) == 0] or [(tp or 1, pp or 1)]


def _microbatches(row: Row, layout: Layout, assumed: list[str]) -> list[tuple[int, int]]:
    """Sequences of a microbatch, and how many there are: printed, or every size that divides."""
    micro, whole = row.count("micro_batch"), row.count("global_batch_seqs")
    shards = layout.data_shards
    if whole is None:
        micro = micro or 1
        n = 4 * layout.pipeline if layout.pipeline > 1 else 1
        assumed.append(f"global_batch_seqs={micro * n * shards}")
        return [(micro, n)]
    per_shard = max(round(whole / shards), 1)
    if micro is None:
        assumed.append("micro_batch: the fastest that fits")
        usual = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
        return [(size, per_shard // size) for size in divisors(per_shard) if size in usual]
    n = max(round(per_shard / micro), 1)
    if layout.pipeline > 1 and n == 1 and micro > 1:  # a local batch, which the schedule cuts
        n = math.gcd(micro, layout.pipeline) if micro < layout.pipeline else min(layout.pipeline, micro)
        assumed.append(f"microbatches={n}")
        return [(max(micro // n, 1), n)]
    return [(micro, n)]


def _remats(row: Row, practice: Practice, assumed: list[str]) -> list[tuple[str, float]]:
    said = words.recompute(row.text("remat"))
    if said is not None and said.kind == "selective" and practice.name == "fsdp":
        return [("ops", said.share)]
    if said is not None:
        return [(said.kind, said.share)]
    if practice.name == XLA.name and not re.search(r"t5x|pathways", row.text("software").lower()):
        assumed.append(_said(row, "remat", "full"))  # the default of MaxText's base.yml and of Praxis
        return [("full", 1.0)]
    assumed.append(_said(row, "remat", "the least that fits"))
    parts = [("full", share) for share in (0.25, 0.5, 0.75, 1.0)]
    return [("none", 1.0), *parts] if practice.flash else [("none", 1.0), ("selective", 1.0), ("full", 1.0)]


def measured_step_s(row: Row, case_flops: Callable[[str], float], peak: float | None) -> tuple[float | None, str]:
    """The printed step time, or what tokens/s, TFLOP/s or MFU make of it; and which of them it was.

    `case_flops`: FLOPs of a step by the convention that a text names.
    """
    if step_s := row.number("step_time_s"):
        return step_s, "step_time_s"
    n, length, whole = row.count("n_devices"), row.count("seq_len"), row.count("global_batch_seqs")
    if not (n and length and whole):
        return None, "nothing printed"
    if rate := row.number("tokens_per_s_per_device"):
        return whole * length / rate / n, "tokens_per_s_per_device"
    flops = case_flops(row.text("flops_count"))
    if tflops := row.number("tflops_per_device"):
        return flops / (tflops * 1e12 * n), "tflops_per_device"
    if (mfu := row.number("mfu")) and peak:
        return flops / (mfu * peak * n), "mfu"
    return None, "nothing printed"
