"""What a run is: the flags that train, ladder and forecast share, and how they become a rung.

This is the only reader of argv for those verbs; each adds a few fields of its own.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from experiments import data
from experiments.entry import flag, overrides
from experiments.hardware import Device
from experiments.objectives import Objective
from experiments.optimizer import OptimizerConfig
from experiments.records import SCHEMA, Record, provenance
from experiments.step import HOST_MEMORY, TrainStep, chip_of, objective_of
from transformer import grouped
from transformer.accounting import Attention, model_flops_per_token, utilization
from transformer.backends import Chip, Needs, choose
from transformer.config import Backend, ExpertProducts, ModelConfig, Precision, Remat, Weights
from transformer.errors import RequestError, nearest
from transformer.layouts import Split, check, divisors
from transformer.presets import preset
from transformer.remat import fates, offloaded
from transformer.sharding import AXES, Layout, make_mesh


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One step of a ladder: so many devices, laid out so, fed with so much."""

    n_devices: int
    layout: Layout
    micro_batch_seqs: int  # per data shard
    microbatches: int
    failed: str | None = None  # why it cannot run, known beforehand

    @property
    def global_batch_seqs(self) -> int:
        return self.micro_batch_seqs * self.microbatches * self.layout.data_shards


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The experiment, but for the devices that it runs on."""

    preset: str = flag("tiny", "the model, by its slug")
    model: Mapping[str, str] = overrides("model", "a key of ModelConfig, as in --model.n_layers=12")
    layout: str = flag(
        "", "sizes of mesh axes, data taking what is left: fsdp=8,tensor=2; per rung: 64:fsdp=8;1024:fsdp=128,tensor=8"
    )
    seq_len: int | None = flag(None, "tokens in a sequence; default: the preset's max_len")
    micro_batch_seqs: int | None = flag(
        None, "sequences of one data shard in one forward pass; default: 8, but at most 16,384 tokens, and what divides"
    )
    microbatches: int | None = flag(
        None, "forward passes of one step; default: 1, and with a pipeline four times its stages, or what "
        "--global_batch_seqs leaves"
    )  # fmt: skip
    global_batch_seqs: int | None = flag(
        None, "sequences of one step over all devices: fixes them, and so makes the scaling strong"
    )
    remat: Remat = flag(
        "full", "what the forward pass forgets: none, dots (all but matrix products), full; and by tensor: "
        "full,ffn_up:save,layer_input:offload"
    )  # fmt: skip
    weights: Weights = flag("f32", "parameters between steps; bf16: half the bytes, updates rounded by chance")
    offload_optimizer: bool = flag(False, "keep AdamW's moments in the host's memory, and fetch them for the update")
    precision: Literal["auto", "bf16", "f32", "fp8", "int8"] = flag(
        "auto", "of compute; auto: bf16, but f32 on CPUs; fp8, int8: linear maps in 8 bit, the rest in bf16"
    )
    attention: Literal["auto", "xla", "blockwise", "cudnn", "splash"] = flag(
        "auto", "how attention is computed; auto: cudnn on NVIDIA GPUs, splash on TPUs, where they can; "
        "else xla, for long sequences blockwise"
    )  # fmt: skip
    experts: ExpertProducts = flag(
        "loop",
        "how dropless experts are multiplied; grouped: by one kernel, on Hopper GPUs in bf16; not run on one yet",
    )
    seed: int = flag(0, "of initial values and of the order of the data")
    facts: str | None = flag(None, "a TOML file that adds to or overrides hardware facts and prices")
    json: bool = flag(False, "print the table as JSON on standard output, all else on standard error")

    def __post_init__(self) -> None:
        for name in ("seq_len", "micro_batch_seqs", "microbatches", "global_batch_seqs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"--{name}={value}: expected at least 1")
        fates(self.remat)  # raises
        config = self.resolved_model
        if config.position == "learned" and self.length > config.max_len:
            raise RequestError(
                f"--seq_len={self.length} is beyond the {config.max_len} learned positions of {self.preset}; "
                f"nearest: --seq_len={config.max_len}"
            )

    @cached_property
    def resolved_model(self) -> ModelConfig:
        """The preset with its overrides."""
        return preset(self.preset, self.model)

    @property
    def objective(self) -> Objective:
        """What the model is trained to predict."""
        return objective_of(self.resolved_model)

    @property
    def length(self) -> int:
        """Tokens in a sequence."""
        return self.seq_len or self.resolved_model.max_len

    @property
    def micro_batch(self) -> int:
        """Sequences of one data shard in one forward pass."""
        return self.micro_batch_seqs or max(1, min(8, 16_384 // self.length))

    @property
    def scaling(self) -> Literal["weak", "strong"]:
        return "weak" if self.global_batch_seqs is None else "strong"

    def rung(self, n_devices: int) -> Rung:
        """The rung of so many devices. RequestError if the layout does not divide them or the model."""
        layout = layout_of(self.layout, n_devices)
        if layout.pipeline > 1 and offloaded(self.remat):
            raise RequestError(
                f"--remat={self.remat}: a pipeline={layout.pipeline} keeps its microbatches on the device; "
                f"nearest: {offloaded(self.remat)[0]}:save"
            )
        if self.global_batch_seqs is None:
            # Four microbatches a stage make the bubble small (Huang et al. 2019, sec. 2.3).
            microbatches = self.microbatches or (4 * layout.pipeline if layout.pipeline > 1 else 1)
            rung = Rung(
                n_devices=n_devices, layout=layout, micro_batch_seqs=self.micro_batch, microbatches=microbatches
            )
        else:
            rung = self._strong(n_devices, layout, self.global_batch_seqs)
        check(self.resolved_model, Split(layout, rung.microbatches), length=self.length)
        return rung

    def _strong(self, n_devices: int, layout: Layout, batch: int) -> Rung:
        shards = layout.data_shards
        if shards > batch:
            most = next((n for n in range(n_devices - 1, 0, -1) if self._works(n, batch)), None)
            works = "no smaller count works" if most is None else f"the largest count that works is {most} devices"
            reason = f"{shards} data shards for {batch} sequences: {works}"
            return Rung(n_devices=n_devices, layout=layout, micro_batch_seqs=1, microbatches=1, failed=reason)
        if batch % shards:
            near = round(batch / shards) * shards
            raise RequestError(
                f"--global_batch_seqs={batch} does not divide over {shards} data shards "
                f"at {n_devices} devices; nearest: {near}"
            )
        per_shard = batch // shards
        if self.microbatches is not None:
            return self._in_microbatches(n_devices, layout, per_shard, self.microbatches)
        micro = min(self.micro_batch, per_shard)
        near = max(m for m in divisors(per_shard) if m <= micro)
        if self.micro_batch_seqs is None:
            micro = near
        if per_shard % micro:
            raise RequestError(
                f"--micro_batch_seqs={micro} does not divide the {per_shard} sequences of a data shard "
                f"at {n_devices} devices; nearest: {near}"
            )
        return Rung(n_devices=n_devices, layout=layout, micro_batch_seqs=micro, microbatches=per_shard // micro)

    def _in_microbatches(self, n_devices: int, layout: Layout, per_shard: int, microbatches: int) -> Rung:
        if per_shard % microbatches:
            near = min(divisors(per_shard), key=lambda m: abs(m - microbatches))
            raise RequestError(
                f"--microbatches={microbatches} does not divide the {per_shard} sequences of a data shard "
                f"at {n_devices} devices; nearest: {near}"
            )
        if self.micro_batch_seqs not in (None, per_shard // microbatches):
            raise RequestError(
                f"--micro_batch_seqs={self.micro_batch_seqs} and --microbatches={microbatches} make "
                f"{self.micro_batch_seqs * microbatches} sequences of a data shard, not {per_shard}; "
                f"nearest: --micro_batch_seqs={per_shard // microbatches}"
            )
        return Rung(
            n_devices=n_devices, layout=layout, micro_batch_seqs=per_shard // microbatches, microbatches=microbatches
        )

    def _works(self, n_devices: int, batch: int) -> bool:
        """Whether so many devices can share `batch` sequences."""
        try:
            if batch % layout_of(self.layout, n_devices).data_shards:
                return False  # said before all else is asked, for there may be thousands of counts
            return self.rung(n_devices).failed is None
        except RequestError:
            return False

    def resolved_precision(self, platform: str) -> Precision:
        if self.precision != "auto":
            return self.precision
        return "f32" if platform == "cpu" else "bf16"  # CPUs emulate bf16, slowly

    def check_rate(self, device: Device | None) -> None:
        """RequestError if a known device does not multiply in the 8 bit that is asked for."""
        if device and self.precision in ("fp8", "int8") and self.precision not in device.peak_flops_per_s:
            known = ", ".join(sorted(device.peak_flops_per_s))
            raise RequestError(
                f"--precision={self.precision}: {device.slug} has rates of {known}; nearest: --precision=bf16"
            )

    def resolved_attention(self, chip: Chip, layout: Layout) -> tuple[Backend, str]:
        """The backend that runs, and why. RequestError where the one asked for cannot."""
        config = self.resolved_model
        both_sides = bool(config.window or config.chunk) and config.family != "decoder"
        needs = Needs(
            score=config.score, bias=config.position in ("relative", "alibi"), cap=config.score_cap is not None,
            sinks=config.sinks, prefix=config.prefix, segments=self.objective == "pairs", window=bool(config.window),
            pattern=bool(config.chunk) or both_sides, both_sides=both_sides, split=layout.context > 1,
            ring=bool(layout.ring), d_head=config.d_head, d_value=config.value_size,
        )  # fmt: skip
        return choose(
            self.attention, needs, chip=chip, precision=self.resolved_precision(chip.platform), length=self.length
        )

    def resolved_experts(self, chip: Chip, layout: Layout) -> tuple[ExpertProducts, str]:
        """How dropless experts are multiplied, and why. RequestError where what is asked for cannot be."""
        precision = self.resolved_precision(chip.platform)
        return grouped.choose(self.experts, self.resolved_model, chip=chip, precision=precision, tensor=layout.tensor)

    def remarks(self, chip: Chip, layout: Layout) -> list[str]:
        """What is chosen and why, for who runs it. RequestError where what is asked for cannot be."""
        said = [f"attention: {self.resolved_attention(chip, layout)[1]}"]
        experts = self.resolved_experts(chip, layout)[1]
        return [*said, f"experts: {experts}"] if self.resolved_model.is_dropless else said

    def speed(self, rung: Rung, step_s: float, peak_flops_per_s: float | None) -> Record:
        """What a record says of a step that takes so long: tokens a second, and the model's FLOPs over the peak."""
        tokens_per_s = rung.global_batch_seqs * self.length / step_s

        def used(kind: Attention) -> float | None:
            flops = model_flops_per_token(self.resolved_model, self.length, kind)
            return self.used(rung, step_s, peak_flops_per_s, flops)

        return {
            "tokens_per_s": tokens_per_s,
            "tokens_per_s_per_device": tokens_per_s / rung.n_devices,
            "mfu": {"full": used("full"), "causal": used("causal")},
        }

    def used(self, rung: Rung, step_s: float, peak_flops_per_s: float | None, flops_per_token: float) -> float | None:
        """Part of the peak that so many FLOPs a token are. Of an unknown device None, and never a guess."""
        if peak_flops_per_s is None:
            return None
        tokens_per_s = rung.global_batch_seqs * self.length / step_s
        return utilization(
            flops_per_token=flops_per_token, tokens_per_s=tokens_per_s, n_devices=rung.n_devices,
            peak_flops_per_s=peak_flops_per_s,
        )  # fmt: skip

    def record(self, rung: Rung, *, kind: str, device: str, chip: Chip) -> Record:
        """What a record of this rung says before anything is known of it."""
        experts, because = self.resolved_experts(chip, rung.layout)
        is_dropless = self.resolved_model.is_dropless
        return {
            "schema": SCHEMA,
            "kind": kind,
            "preset": self.preset,
            "model": dataclasses.asdict(self.resolved_model),
            "config": {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)},
            "device": device,
            "n_devices": rung.n_devices,
            "layout": dataclasses.asdict(rung.layout)
            | {
                "microbatches": rung.microbatches,
                "remat": self.remat,
                "precision": self.resolved_precision(chip.platform),
                "weights": self.weights,
                "optimizer": "host" if self.offload_optimizer else "device",
                "attention": self.resolved_attention(chip, rung.layout)[0],
                **({"experts": experts} if is_dropless else {}),
            },
            "attention_because": self.resolved_attention(chip, rung.layout)[1],
            **({"experts_because": because} if is_dropless else {}),
            "scaling": self.scaling,
            "micro_batch_seqs": rung.micro_batch_seqs,
            "global_batch_seqs": self.global_batch_seqs
            or rung.global_batch_seqs,  # a failed rung has what was asked for
            "seq_len": self.length,
            "failed": rung.failed,
            **provenance(),
        }


@dataclass(frozen=True, kw_only=True)
class TextRunConfig(RunConfig):
    """An experiment that reads text: what training and measuring share, and a forecast does without."""

    dataset: str | None = flag(
        None, "shakespeare, web, en_es, tfds:NAME, text:GLOB or, of pairs, tsv:FILE; default: en_es for an "
        "encoder_decoder, which reads pairs, else shakespeare"
    )  # fmt: skip

    @property
    def text(self) -> str:
        """The dataset that is read."""
        return self.dataset or data.default_dataset(self.objective)

    def batches(self, rung: Rung, step: TrainStep, split: data.Split) -> Any:
        """The rows of a rung's batches that this process brings (`data.batches`)."""
        return data.batches(
            self.text, objective=self.objective, split=split, batch_seqs=rung.global_batch_seqs, seq_len=self.length,
            seed=self.seed, vocab_size=self.resolved_model.vocab_size, rows=step.local_rows(rung.global_batch_seqs),
        )  # fmt: skip


def _plain(value: Any) -> Any:
    """A field of a request as JSON has it."""
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def train_step(run: RunConfig, rung: Rung, devices: list, optimizer: OptimizerConfig = OptimizerConfig()) -> TrainStep:
    """The street from a rung to its compiled step, on devices that are here or not."""
    memories = {memory.kind for memory in devices[0].addressable_memories()}  # those of absent GPUs are not told
    if memories and HOST_MEMORY not in memories and (run.offload_optimizer or offloaded(run.remat)):
        asked = "offload_optimizer" if run.offload_optimizer else f"remat={run.remat}"
        raise RequestError(
            f"--{asked}: {devices[0].device_kind} has no {HOST_MEMORY} memory; it has {sorted(memories)}"
        )
    mesh = make_mesh(rung.layout, devices)
    chip = chip_of(devices[0])
    return TrainStep(
        config=run.resolved_model, mesh=mesh, optimizer=optimizer, remat=run.remat,
        precision=run.resolved_precision(chip.platform), backend=run.resolved_attention(chip, rung.layout)[0],
        experts=run.resolved_experts(chip, rung.layout)[0], microbatches=rung.microbatches, zero=rung.layout.zero,
        ring=bool(rung.layout.ring), repeats=rung.layout.repeats, weights=run.weights,
        offload_optimizer=run.offload_optimizer, seed=run.seed,
    )  # fmt: skip


def layout_of(text: str, n_devices: int) -> Layout:
    """The layout that `--layout` gives to a rung. `data` takes what is left.

    >>> layout_of("64:fsdp=8;1024:fsdp=128,tensor=8", 2048)
    Layout(data=2, fsdp=128, tensor=8)
    """
    if n_devices < 1:
        raise RequestError(f"--devices={n_devices}: expected at least 1")
    sizes = _sizes(_entry_for(text, n_devices))
    product = math.prod(sizes.get(axis, 1) for axis in AXES)
    if "data" in sizes and product != n_devices:
        raise RequestError(
            f"--layout={text} is of {product} devices, not {n_devices}; without data=, it takes what is left"
        )
    if n_devices % product:
        near = max(1, round(n_devices / product)) * product
        raise RequestError(f"--layout={text}: {n_devices} devices do not divide by {product}; nearest count: {near}")
    return Layout(**{"data": n_devices // product} | sizes)


def _entry_for(text: str, n_devices: int) -> str:
    """Of `64:...;1024:...` the last entry at or below the rung; a text without counts is for every rung."""
    if ":" not in text:
        return text
    entries = {}
    for entry in text.split(";"):
        count, colon, sizes = entry.partition(":")
        if not colon or not count.strip().isdecimal():
            raise RequestError(f"--layout={text}: {entry!r} has no device count, as in 64:fsdp=8")
        if int(count) in entries:
            raise RequestError(f"--layout={text}: {int(count)} devices are given twice")
        entries[int(count)] = sizes
    below = [count for count in entries if count <= n_devices]
    if not below:
        raise RequestError(f"--layout={text}: no entry at or below {n_devices} devices; the lowest is {min(entries)}")
    return entries[max(below)]


_USES = {"zero": (1, 2, 3), "ring": (0, 1)}
"""What a layout says beside sizes, and what it can say."""


def _sizes(text: str) -> dict[str, int]:
    known = [field.name for field in dataclasses.fields(Layout)]
    sizes: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        axis, _, size = part.partition("=")
        if axis not in known:
            raise RequestError(f"unknown mesh axis {axis!r} in --layout: {nearest(axis, known)}")
        if axis in _USES:
            if size not in map(str, _USES[axis]):
                raise RequestError(f"--layout: {part!r}: expected {axis}= one of {', '.join(map(str, _USES[axis]))}")
        elif not size.isdecimal() or int(size) < 1:
            raise RequestError(f"--layout: {part!r} is not an axis and its size, as in {axis}=8")
        if axis in sizes:
            raise RequestError(f"--layout: {axis!r} is given twice, as {sizes[axis]} and {size}")
        sizes[axis] = int(size)
    return sizes
