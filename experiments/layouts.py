"""Prove layouts: the same model and batches under one device and under many layouts, and how far they differ.

    python -m experiments.layouts --preset=tiny --devices=8 --out=runs/layouts

Three optimizer steps each, of 40 layouts that try every axis with every other; `--layouts=0` takes all there are, and
`--layout=fsdp=2,pipeline=4 --microbatches=8` one. Where fewer devices are attached, the CPU is split into virtual ones:
they share its cores, and talk by the collectives that a cluster would run. A layout is proven where the loss of every
step and every gradient of every parameter are within the tolerance of those of one device: 1e-4 in float32, 2e-2 in
bfloat16, of the largest entry of that gradient (or of a thousandth of the largest of all: what is smaller is rounding).

In bfloat16 a router's near ties fall one way or the other with the last bit, on whatever layout, and a token's gradient
goes to another expert. So experts are proven in float32, and in bfloat16 where every token meets all of them
(`--model.experts_per_token` as many as `n_experts`).

    python -m experiments.layouts --explain --preset=llama3-8b --device=h100-sxm --devices=64 --layout=fsdp=8,tensor=8

runs nothing: it prints what one layout places where, before the step is compiled, and after, what travels and which
module and source line caused it.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments import attached, entry, show
from experiments.config import Rung, TextRunConfig, train_step
from experiments.diagnosis.explain import explain
from experiments.entry import flag
from experiments.forecast.rung import ABSENT
from experiments.forecast.topology import devices_of
from experiments.hardware import load
from experiments.records import Record, append_line, check_out, provenance
from experiments.step import chip_of
from transformer.config import Precision
from transformer.errors import RequestError
from transformer.layouts import Split, covering, valid
from transformer.sharding import Layout

TOLERANCE: dict[Precision, float] = {"f32": 1e-4, "bf16": 2e-2}
"""Largest difference of a proven layout."""

FILE = "layouts.jsonl"


@dataclass(frozen=True, kw_only=True)
class LayoutsRequest(TextRunConfig):
    """`python -m experiments.layouts`"""

    devices: int = flag(8, "devices that a layout has")
    layouts: int = flag(40, "how many, those first that try most; 0: all")
    steps: int = flag(3, "optimizer steps that are compared")
    explain: bool = flag(False, "run nothing: what the layout places where, and what the compiler makes of it")
    device: str = flag("", "of --explain: compile for this absent device, by its slug; default: what is attached")
    out: str = flag("runs/layouts", f"the folder for {FILE}")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision in ("fp8", "int8"):
            raise RequestError(f"--precision={self.precision}: layouts are proven in f32 or bf16; nearest: bf16")
        for name, least in (("devices", 1), ("layouts", 0), ("steps", 1)):
            if getattr(self, name) < least:
                raise RequestError(f"--{name}={getattr(self, name)}: expected at least {least}")

        if self.device and not self.explain:
            raise RequestError(f"--device={self.device} is of --explain; layouts are proven on what is attached")

    @property
    def length(self) -> int:
        """Short, for what is compared does not depend on it; but what is explained is the run itself."""
        return super().length if self.explain else self.seq_len or min(64, self.resolved_model.max_len)

    @property
    def batch(self) -> int:
        """Sequences of a step: enough for every device to have two, or a pipeline two microbatches."""
        return self.global_batch_seqs or 2 * self.devices

    def splits(self) -> list[Split]:
        """The layouts that are asked for, refused in one line where there is none."""
        if self.layout:
            rung = dataclasses.replace(self, global_batch_seqs=self.batch).rung(self.devices)
            return [Split(rung.layout, rung.microbatches)]
        found = list(valid(self.resolved_model, self.devices, length=self.length, batch=self.batch))
        if not found:
            raise RequestError(
                f"no layout of {self.devices} devices fits --preset={self.preset}, --seq_len={self.length} and "
                f"--global_batch_seqs={self.batch}; nearest: --devices=1"
            )
        return covering(found, self.layouts or len(found))


def main(request: LayoutsRequest) -> int:
    if request.explain:
        return _explain(request)
    attached.look_for_what_is_there()
    attached.at_least(request.devices)
    splits = request.splits()
    folder = Path(request.out)
    check_out(folder)
    precision = request.resolved_precision(chip_of(jax.devices()[0]).platform)
    known = dict(_known(folder))
    family = request.resolved_model.family + (" with experts" if request.resolved_model.n_experts else "")

    done = []
    with show.Progress(f"{request.preset}: {family}", total=len(splits)) as progress:
        want: list[Step] | None = None
        for split in splits:
            record = _asked(request, split, precision)
            with progress.rung(str(split), request.steps) as advance:
                if _key(record) in known:
                    done.append(known[_key(record)])
                    continue
                if want is None:
                    want = list(_run(request, Split(Layout())))
                record |= _compared(request, split, want, advance, TOLERANCE[precision])
            append_line(folder / FILE, record)
            done.append(record)
    _show(done, as_json=request.json)
    n_proven = sum(r["proven"] for r in done)
    print(f"{n_proven} of {len(done)} layouts of {family} are proven; {folder / FILE}", file=sys.stderr)
    return 0 if n_proven == len(done) else 1


def _explain(request: LayoutsRequest) -> int:
    if not request.device:
        attached.look_for_what_is_there()
        attached.keep_nothing()
        attached.at_least(request.devices)
        return explain(request, request.devices, jax.devices(), {})
    attached.hide_all()
    cluster = devices_of(load(request.facts).device(request.device), request.rung(request.devices).layout)
    return explain(request, request.devices, cluster, ABSENT[chip_of(cluster[0]).platform])


Step = tuple[float, Any]
"""Loss of a step and its gradients on the host."""


def _run(request: LayoutsRequest, split: Split) -> Iterator[Step]:
    """The steps of a layout, from the same parameters and batches whatever it is."""
    rung = Rung(
        n_devices=split.layout.n_devices, layout=split.layout, microbatches=split.microbatches,
        micro_batch_seqs=request.batch // (split.layout.data_shards * split.microbatches),
    )  # fmt: skip
    step = train_step(request, rung, jax.devices())
    # Drawn by one device: how random numbers are made depends on where.
    state = train_step(request, dataclasses.replace(rung, layout=Layout()), jax.devices()).init(
        jax.random.key(request.seed)
    )
    state = jax.device_put(jax.device_get(state), step.state_shardings)
    # XLA's own optimizations of the CPU's code are left out: they take most of the time, and decide nothing here.
    both = jax.jit(step.with_gradients, compiler_options={"xla_backend_optimization_level": 0})
    batches = request.batches(rung, step, "train")
    for _, rows in zip(range(request.steps), batches, strict=False):
        state, metrics, grads = both(state, step.place(rows, request.batch))
        yield float(metrics["loss"]), jax.device_get(grads)


def _compared(
    request: LayoutsRequest, split: Split, want: list[Step], advance: show.Advance, tolerance: float
) -> Record:
    loss, gradient, worst = 0.0, 0.0, ""
    for (loss_a, grads_a), (loss_b, grads_b) in zip(_run(request, split), want, strict=True):
        loss = max(loss, abs(loss_a - loss_b) / abs(loss_b))
        difference, name = largest_difference(grads_a, grads_b)
        if not difference <= gradient:
            gradient, worst = difference, name
        advance(f"{gradient:.1e}")
    return {
        "loss_difference": loss, "gradient_difference": gradient, "worst_gradient": worst,
        "proven": bool(loss <= tolerance and gradient <= tolerance),
    }  # fmt: skip


def largest_difference(got: Any, want: Any) -> tuple[float, str]:
    """Of the gradients of all parameters, each in parts of its own largest entry or of a thousandth of the largest of
    all; and whose it is. The gradient of a key's bias is nothing but rounding, for a softmax does not see it."""
    flat, _ = jax.tree_util.tree_flatten_with_path(want)
    floor = 1e-3 * max(float(np.abs(g).max()) for _, g in flat)
    differences = {
        "/".join(str(key.key) for key in path): float(np.abs(a - b).max()) / max(float(np.abs(b).max()), floor)
        for (path, b), a in zip(flat, jax.tree.leaves(got), strict=True)
    }
    name = max(differences, key=lambda n: float("inf") if differences[n] != differences[n] else differences[n])
    return differences[name], name


def _asked(request: LayoutsRequest, split: Split, precision: Precision) -> Record:
    """What a record says before anything has run."""
    model = request.resolved_model
    return {
        "family": model.family, "experts": model.n_experts or 0, "preset": request.preset,
        "model": dataclasses.asdict(model), "layout": str(split.layout), "microbatches": split.microbatches,
        "devices": request.devices, "steps": request.steps, "seq_len": request.length,
        "global_batch_seqs": request.batch, "remat": request.remat, "precision": precision, "seed": request.seed,
        "dataset": request.text, "tolerance": TOLERANCE[precision], **provenance(),
    }  # fmt: skip


def _key(record: Record) -> str:
    """What was compared, and by which code."""
    return json.dumps({k: v for k, v in record.items() if k not in ("created", "command") and k in _ASKED})


_ASKED = (
    "preset", "model", "layout", "microbatches", "devices", "steps", "seq_len", "global_batch_seqs", "remat",
    "precision", "seed", "dataset", "versions", "commit",
)  # fmt: skip


def _known(folder: Path) -> Iterator[tuple[str, Record]]:
    """Records of the folder by their key. A line that was cut off is not one."""
    path = folder / FILE
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        yield _key(record), record


def _show(done: list[Record], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(done))
        return
    table = Table(title=f"Differences from one device; tolerance {done[0]['tolerance']:g} ({done[0]['precision']})")
    for name in ("layout", "microbatches", "loss", "gradient", "worst gradient", "proven"):
        table.add_column(name, justify="right" if name in ("microbatches", "loss", "gradient") else "left")
    for r in done:
        table.add_row(
            r["layout"], str(r["microbatches"]), f"{r['loss_difference']:.1e}", f"{r['gradient_difference']:.1e}",
            r["worst_gradient"], "yes" if r["proven"] else "NO",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    entry.start(main, LayoutsRequest)
