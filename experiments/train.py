"""Train a model on text: loss, checkpoints, metrics, and a sample of what it writes.

    python -m experiments.train --preset=tiny --steps=300 --out=runs/train

About two minutes on two CPU cores; the validation loss ends near 2.3 nats a byte, where knowing only how often
each byte occurs gives 3.3. The same command resumes where it was stopped.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import attached, data, distributed, entry, show
from experiments.checkpoint import Checkpoints, claim
from experiments.compiler import compile_step
from experiments.config import Rung, TextRunConfig, train_step
from experiments.entry import flag
from experiments.hardware import load
from experiments.optimizer import OptimizerConfig
from experiments.records import check_out, write_whole
from experiments.step import TrainState, TrainStep, chip_of
from transformer.decoding import fill, sample
from transformer.errors import RequestError
from transformer.models import Transformer


@dataclass(frozen=True, kw_only=True)
class TrainRequest(TextRunConfig):
    """`python -m experiments.train`"""

    devices: int | None = flag(None, "how many attached devices; default: all")
    steps: int = flag(300, "optimizer steps, at which the learning rate has decayed")
    learning_rate: float = flag(3e-3, "peak, after warm-up")
    warmup_steps: int = flag(50, "over which the learning rate rises")
    weight_decay: float = flag(0.1, "of matrices, by AdamW")
    clip_norm: float = flag(1.0, "largest global norm of a gradient")
    validate_every: int = flag(100, "steps between looks at the held-out split")
    checkpoint_every: int = flag(100, "steps between checkpoints")
    sample_tokens: int = flag(200, "most tokens of the sample at the end; 0 for none")
    out: str = flag("runs/train", "the folder for checkpoints, metrics.jsonl, TensorBoard events")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "validate_every", "checkpoint_every", "learning_rate", "clip_norm"):
            if getattr(self, name) <= 0:
                raise RequestError(f"--{name}={getattr(self, name)}: expected a positive number")
        for name in ("warmup_steps", "weight_decay", "sample_tokens"):
            if getattr(self, name) < 0:
                raise RequestError(f"--{name}={getattr(self, name)}: expected 0 or more")

    @property
    def optimizer(self) -> OptimizerConfig:
        return OptimizerConfig(
            learning_rate=self.learning_rate, warmup_steps=self.warmup_steps, total_steps=self.steps,
            weight_decay=self.weight_decay, clip_norm=self.clip_norm,
        )  # fmt: skip


def main(request: TrainRequest) -> int:
    attached.look_for_what_is_there()
    distributed.join()
    request.check_rate(load(request.facts).by_jax_kind(jax.devices()[0].device_kind))
    n_attached = jax.device_count()
    rung = request.rung(n_attached if request.devices is None else request.devices)
    if rung.failed:
        raise RequestError(rung.failed)
    if rung.n_devices > n_attached:
        raise RequestError(f"--devices={rung.n_devices}: {n_attached} devices are attached")
    for remark in request.remarks(chip_of(jax.devices()[0]), rung.layout):
        show.remark(remark)
    folder = Path(request.out)
    check_out(folder)
    step = train_step(request, rung, jax.devices(), request.optimizer)
    batches = request.batches(rung, step, "train")
    request.batches(rung, step, "validation")  # what is wrong with it is said before any work
    claim(folder, _learns(request, rung), write=distributed.is_lead())
    checkpoints = Checkpoints(folder)
    try:
        state, first = _start(request, step, checkpoints, batches)
        with Log(folder, first, request.steps) as log:
            state = _train(request, rung, step, state, batches, checkpoints, log, first)
    finally:
        checkpoints.close()
    loss = _validate(request, rung, step, state)
    if distributed.is_lead():
        baseline = data.unigram_entropy_nats(request.text, "validation", objective=request.objective)
        bits = loss / math.log(2)
        print(f"validation loss {loss:.4f} nats per byte ({bits:.3f} bits); byte frequencies alone: {baseline:.4f}")
    if request.sample_tokens and jax.process_count() == 1:
        print(_sample(request, rung, step, state))
    return 0


def _learns(request: TrainRequest, rung: Rung) -> dict[str, Any]:
    """The request with what its defaults and the number of devices come to: two that agree learn the same."""
    asked = request.record(rung, kind="measured", device="", chip=chip_of(jax.devices()[0]))
    resolved = {key: asked[key] for key in ("seq_len", "global_batch_seqs")}
    resolved |= {"dataset": request.text, "precision": asked["layout"]["precision"]}
    if request.resolved_model.dropout:  # each microbatch draws its own
        resolved["microbatches"] = rung.microbatches
    return asked["config"] | resolved


def _start(request: TrainRequest, step: TrainStep, checkpoints: Checkpoints, batches: Any) -> tuple[TrainState, int]:
    """The state to go on from and how many steps are behind it."""
    if checkpoints.latest is None:
        return step.init(jax.random.key(request.seed)), 0
    state, where = checkpoints.restore(checkpoints.latest, step.abstract_state)
    batches.set_state(where)
    print(f"resumed at step {checkpoints.latest}", file=sys.stderr)
    return state, checkpoints.latest


def _train(
    request: TrainRequest, rung: Rung, step: TrainStep, state: TrainState, batches: Any,
    checkpoints: Checkpoints, log: "Log", first: int,
) -> TrainState:  # fmt: skip
    if first >= request.steps:
        return state
    tokens = rung.global_batch_seqs * request.length
    with show.Progress(f"{request.preset} on {rung.n_devices} devices", total=1) as progress, \
            progress.rung("training", request.steps - first) as advance:  # fmt: skip
        lowered = step.step.lower(step.abstract_state, step.abstract_batch(rung.global_batch_seqs, request.length))
        compiled, _ = compile_step(lowered, {})
        for i in range(first + 1, request.steps + 1):
            started = time.perf_counter()
            state, metrics = compiled(state, step.place(next(batches), rung.global_batch_seqs))
            loss = float(metrics["loss"])  # waits for the step
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"loss is {loss} at step {i}: lower --learning_rate; the last checkpoint is kept"
                )
            seconds = time.perf_counter() - started
            entry_of_step = {"loss": loss, "grad_norm": float(metrics["grad_norm"]), "step_s": seconds}
            if i % request.validate_every == 0:
                entry_of_step["validation_loss"] = _validate(request, rung, step, state)
            log.write(i, entry_of_step)
            advance(f"loss {loss:.3f}  {tokens / seconds:,.0f} tokens/s")
            if i % request.checkpoint_every == 0 or i == request.steps:
                checkpoints.save(i, state, batches.get_state())
    return state


def _validate(request: TrainRequest, rung: Rung, step: TrainStep, state: TrainState, most: int = 8) -> float:
    """Mean loss over the first batches of the held-out split, in nats per token."""
    total, weight = 0.0, 0.0
    for _, rows in zip(range(most), request.batches(rung, step, "validation"), strict=False):
        found = step.loss(state.params, step.place(rows, rung.global_batch_seqs))
        total, weight = total + float(found[0]), weight + float(found[1])
    return total / weight


def _sample(request: TrainRequest, rung: Rung, step: TrainStep, state: TrainState) -> str:
    """What the model has learnt, to look at: what it writes after a line break, what it takes hidden bytes of the
    held-out text for, how it translates the first held-out pair."""
    config = request.resolved_model
    model, params = Transformer(config), jax.device_get(state.params)
    key = jax.random.key(request.seed)
    if request.objective == "masked":
        held_out = next(request.batches(rung, step, "validation"))
        row = {name: array[:1, : request.sample_tokens] for name, array in held_out.items()}
        guess = np.asarray(jax.jit(fill, static_argnums=0)(model, params, row["inputs"]))
        hidden = row["inputs"] == data.MASK
        shown = np.where(hidden, data.encode("_")[0], row["inputs"])
        return f"hidden: {data.decode(shown[0])}\nfilled: {data.decode(np.where(hidden, guess, row['inputs'])[0])}"
    draw = jax.jit(sample, static_argnums=0, static_argnames=("n_tokens", "temperature"))
    if request.objective == "pairs":
        held_out = next(request.batches(rung, step, "validation"))
        first = held_out["source_segments"][:1] == 1
        source = held_out["source"][:1, : int(first.sum())]
        n_tokens = min(request.sample_tokens, request.length - 1, config.max_len - 1)
        prompt = np.full((1, 1), data.BOS, np.int32)
        tokens = draw(model, params, prompt, key, n_tokens=n_tokens, temperature=0.0, source=source)
        written = np.asarray(tokens)[0, 1:].tolist()
        written = written[: written.index(data.EOS)] if data.EOS in written else written
        meant = held_out["targets"][0][held_out["segments"][0] == 1]
        lines = {"source": source[0], "target": meant, "model": written}
        return "\n".join(f"{name}: {data.decode(ids)}" for name, ids in lines.items())
    prompt = np.concatenate([[data.EOS], data.encode("\n")]).astype(np.int32)[None]
    n_tokens = max(0, min(request.sample_tokens, config.max_len - prompt.shape[1]))
    tokens = draw(model, params, prompt, key, n_tokens=n_tokens, temperature=0.8)
    return data.decode(np.asarray(tokens)[0]).strip()


class Log:
    """metrics.jsonl, one line a step also across restarts, and TensorBoard. Only the lead process writes."""

    def __init__(self, folder: Path, first: int, steps: int) -> None:
        self._path = folder / "metrics.jsonl"
        self._folder, self._first, self._active = folder, first, distributed.is_lead()

    def __enter__(self) -> "Log":
        if not self._active:
            return self
        kept = [line for line in self._lines() if json.loads(line)["step"] <= self._first]
        write_whole(self._path, "".join(f"{line}\n" for line in kept))  # steps after the checkpoint are run again
        from tensorboardX import SummaryWriter

        self._events = SummaryWriter(str(self._folder / "tensorboard"), purge_step=self._first + 1)
        self._file = open(self._path, "a", encoding="utf-8", buffering=1)
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            self._file.close()
            self._events.close()

    def write(self, step: int, values: dict[str, float]) -> None:
        """One step's numbers, at full precision, with the wall time."""
        if not self._active:
            return
        self._file.write(json.dumps({"step": step, **values, "time": time.time()}) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def _lines(self) -> Iterator[str]:
        if not self._path.exists():
            return
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                json.loads(line)
            except json.JSONDecodeError:  # cut short when the process was killed
                return
            yield line


if __name__ == "__main__":
    entry.start(main, TrainRequest)
