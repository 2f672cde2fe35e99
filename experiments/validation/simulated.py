"""Published runs simulated: our own train step at a row's model, layout and batch, compiled without its devices.

What is compiled is this project's program, not the row's framework. The closed form of the same program
(`practice.ours`) is what it must agree with, and what carries it over to the framework. Rows are worked off in
processes of their own, the sources in turn, and each is kept as soon as it is done, by all that decides it.
"""

import dataclasses
import hashlib
import math
import multiprocessing
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from experiments import attached, records
from experiments.compiler import COMPILER_OPTIONS
from experiments.config import RunConfig
from experiments.forecast import constants
from experiments.forecast.closed_form.practice import ours
from experiments.forecast.closed_form.setup import Setup
from experiments.forecast.closed_form.step import ClosedForm
from experiments.forecast.rung import ABSENT, forecast
from experiments.forecast.topology import chip_of, devices_of
from experiments.hardware import Device
from experiments.records import Record
from experiments.validation.score import Scored
from transformer.config import ModelConfig
from transformer.errors import RequestError

T = TypeVar("T")

GOLDEN = 0.6180339887498949
"""Multiples of it, taken modulo one, fall evenly however early one stops."""

PER_OPERATOR = "dots,keys:recompute,attention_projection:recompute,ffn_up:recompute"
"""PyTorch's selective checkpointing by operator as our tensors have it: of seven products every other one is kept."""


class NotExpressed(Exception):
    """What of a row our program cannot do."""


@dataclass(frozen=True, slots=True)
class Task:
    """One compilation. `said`: in what our program differs from what the row asks."""

    run: RunConfig
    setup: Setup  # as ours: what the closed form is asked beside it
    device: Device
    said: tuple[str, ...]

    @property
    def key(self) -> str:
        """Named by all that decides the result, but for the code: the request, facts, constants and the compiler."""
        platform = self.device.platform
        decides = hashlib.sha256()
        for part in (
            _said_of(self.run),
            self.setup.layout.n_devices,
            _said_of(self.device),
            [(name, one.value) for name, one in constants.all_of_them().items()],
            sorted({**COMPILER_OPTIONS[platform], **ABSENT[platform]}.items()),
            [metadata.version(package) for package in ("jax", "jaxlib")],
        ):  # fmt: skip
            decides.update(repr(part).encode())
        return decides.hexdigest()[:32]


def task_of(setup: Setup, device: Device) -> Task:
    """A row's setup as our program runs it. NotExpressed, with the reason, where it cannot."""
    if setup.layers_only:
        raise NotExpressed("layers alone, without head and optimizer")
    if setup.adapters_only:
        raise NotExpressed("frozen weights with adapters (LoRA)")
    if setup.remat_share < 1:
        raise NotExpressed(f"remat of {setup.remat_share:.0%} of the layers")
    said = []
    if setup.precision == "fp16":
        said.append("bf16 for fp16")
    if setup.slow_scaling:
        said.append("fp8 scaled by tensor, not by row")
    if setup.layout.tensor > 1 and not setup.sequence_parallel:
        said.append("the sequence is split over tensor between layers")
    parts = setup.layout.tensor * setup.layout.pipeline
    if setup.model.vocab_rows % parts:
        wider = dataclasses.replace(setup.model, vocab_multiple=math.lcm(setup.model.vocab_multiple, parts))
        said.append(f"{wider.vocab_rows:,} rows of vocabulary, padded for tensor and pipeline")
        setup = dataclasses.replace(setup, model=wider)
    run = RunConfig(
        preset="tiny", model=flags_of(setup.model), layout=str(setup.layout), seq_len=setup.seq_len,
        micro_batch_seqs=setup.micro_batch_seqs, microbatches=setup.microbatches,
        precision="bf16" if setup.precision == "fp16" else setup.precision,
    )  # fmt: skip
    try:
        backend, _ = run.resolved_attention(chip_of(device), setup.layout)
        remat = _remat(setup, is_fused=backend in ("cudnn", "splash"), said=said)
        run = dataclasses.replace(run, remat=remat)
        run.check_rate(device)
        run.rung(setup.layout.n_devices)
    except RequestError as error:
        raise NotExpressed(" ".join(str(error).split())) from None
    as_ours = dataclasses.replace(
        setup, precision=run.precision, remat="ops" if remat == PER_OPERATOR else remat, sequence_parallel=True,
        slow_scaling=False, practice=ours(backend, setup.layout),
    )  # fmt: skip
    return Task(run, as_ours, device, tuple(said))


def _remat(setup: Setup, *, is_fused: bool, said: list[str]) -> str:
    if setup.remat == "ops":
        return PER_OPERATOR
    if setup.remat != "selective":
        return setup.remat
    if not is_fused:
        raise NotExpressed("remat of attention's scores alone: plain attention here has none or dots")
    said.append("no remat: the scores that selective makes again never leave our kernel")
    return "none"


def flags_of(config: ModelConfig) -> Mapping[str, str]:
    """Every key of a model as `--model.key=` takes it.

    >>> from transformer.config import override
    >>> from transformer.presets import preset
    >>> override(preset("tiny"), flags_of(preset("t5-small"))) == preset("t5-small")
    True
    """

    def text(value: Any) -> str:
        return str(value).lower() if isinstance(value, bool) or value is None else str(value)

    return {field.name: text(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _said_of(one: Any) -> list[tuple[str, Any]]:
    """Its fields but for those at their defaults: a new flag or fact changes no name."""
    usual = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in dataclasses.fields(one)}
    told = {name: getattr(one, name) for name in usual}
    return [(name, _plain(value)) for name, value in told.items() if value != usual[name]]


def _plain(value: Any) -> Any:
    """Whose repr is the same in every process."""
    return sorted(value.items()) if isinstance(value, Mapping) else value


def in_turn(rows: Sequence[T], source: Callable[[T], str]) -> list[T]:
    """One row of every source after another, and of each source first those that lie far apart in its table.

    >>> in_turn(["a1", "a2", "a3", "b1", "b2"], lambda row: row[0])
    ['a1', 'b1', 'a3', 'b2', 'a2']
    """
    groups: dict[str, list[T]] = {}
    for row in rows:
        groups.setdefault(source(row), []).append(row)
    spread = [[group[i] for i in sorted(range(len(group)), key=lambda i: i * GOLDEN % 1)] for group in groups.values()]
    return [group[i] for i in range(max(map(len, spread), default=0)) for group in spread if i < len(group)]


def kept(out: Path) -> dict[str, Record]:
    """What is simulated already, by key."""
    if not (out / records.FILE).exists():
        return {}
    return {record["key"]: record for record in records.read_all(out) if "key" in record}


def simulate(tasks: Sequence[Task], out: Path, processes: int) -> Generator[Record, None, None]:
    """The records of tasks as they are done, each appended to `out` before it is given. A task that ends its process
    (a check of the compiler's that fails) is tried once more by itself, and then its record says so. Whoever stops to
    iterate ends what is in flight."""
    left = list(tasks)
    while left:
        suspects: list[Task] = []
        for task, record in _in_processes(left, processes):
            if record is None:
                suspects.append(task)
                continue
            left.remove(task)
            yield _keep(task, record, out)
        for task in suspects:
            _, record = next(_in_processes([task], 1))
            left.remove(task)
            yield _keep(task, record or failed(task, "the compiler ended its process"), out)


def _keep(task: Task, record: Record, out: Path) -> Record:
    record |= {"key": task.key}
    records.append(out, record)
    return record


def _in_processes(tasks: Sequence[Task], processes: int) -> Generator[tuple[Task, Record | None], None, None]:
    """Until a process ends before its time, of whose tasks in flight there is no record."""
    waiting, running = list(reversed(tasks)), dict[Future[Record], Task]()
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=attached.hide_all)
    try:
        while waiting or running:
            try:
                while waiting and len(running) < processes:
                    running[pool.submit(simulated, waiting[-1])] = waiting[-1]
                    waiting.pop()
            except BrokenProcessPool:
                yield from ((task, None) for task in running.values())
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                try:
                    yield task, future.result()
                except BrokenProcessPool:
                    yield task, None
                    yield from ((other, None) for other in running.values())
                    return
    finally:
        is_whole = not (waiting or running)
        pool.shutdown(wait=is_whole, cancel_futures=True)
        for process in [] if is_whole else multiprocessing.active_children():
            process.terminate()


def simulated(task: Task) -> Record:
    """In a process of its own: a record, failed where the compiler or the simulator cannot."""
    rung = task.run.rung(task.setup.layout.n_devices)
    try:
        return forecast(task.run, rung, task.device, devices_of(task.device, rung.layout), lambda _: None)
    except Exception as error:  # one row's fault must not end the others
        return failed(task, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def failed(task: Task, reason: str) -> Record:
    rung = task.run.rung(task.setup.layout.n_devices)
    chip = chip_of(task.device)
    return task.run.record(rung, kind="forecast", device=task.device.slug, chip=chip) | {
        "method": "simulated", "failed": reason, "step_s": None,
    }  # fmt: skip


def beside(row: Scored, task: Task, record: Record, model: ClosedForm) -> Scored:
    """What a row is told of its simulation, in seconds of the row's batch: our program as it is compiled; the closed
    form of the same program; and what the schedule makes of the row's own framework, which the closed form says is so
    many times faster or slower than ours. That is the row's headline, unless our program needs more memory than there
    is, for the compiler then makes again what else it would keep.
    """
    told: Scored = {"simulated_with": list(task.said), "compile_s": record.get("compile_s")}
    if record["failed"]:
        return told | {"not_simulated": record["failed"]}
    scale, measured = row["batch_scale"], row["measured_step_s"]
    as_ours_s, total = scale * record["step_s"]["median"], record["memory_bytes"]["total"]
    ours_s = scale * model.forecast(task.setup).step_s
    by_schedule = as_ours_s / ours_s
    step_s = by_schedule * row["closed_form_s"]
    told |= {
        "simulated_ours_s": as_ours_s, "simulated_ours_error": as_ours_s / measured - 1 if measured else None,
        "closed_form_ours_s": ours_s, "ours_ratio": 1 / by_schedule,
        "simulated_s": step_s, "simulated_error": step_s / measured - 1 if measured else None,
        "simulated_ours_memory_gb": total / 1e9, "simulated_ours_fits": record["fits"],
        "simulated_ours_breakdown_s": {k: scale * v for k, v in record["breakdown_s"].items()},
        "simulated_ours_hidden_s": record["hidden_s"], "attention": record["layout"]["attention"],
    }  # fmt: skip
    if not record["fits"]:
        return told
    return told | {
        "method": "simulated", "step_s": step_s, "error": told["simulated_error"],
        **{name: row[name] / by_schedule for name in ("tokens_per_s", "tokens_per_s_per_device")},
        "mfu": row["mfu"] and row["mfu"] / by_schedule,
        "breakdown_s": {name: by_schedule * s for name, s in row["breakdown_s"].items()},
    }  # fmt: skip
