"""Time train steps honestly: compile and warm-up apart, every step synchronised, every time kept."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import monitoring

from experiments import memory
from experiments.compiler import compile_step
from experiments.diagnosis import compiler
from experiments.records import Record
from experiments.step import TrainStep


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was seen. Seconds are wall time from a step's start until its results were there."""

    step_s: list[float]
    compile_s: float
    compile_kept: bool  # an earlier start had compiled it: then compile_s is the time to read it
    warnings: list[Record] | None  # of the compiler, of tensors that it gathers whole; None: it was not asked
    memory_bytes: Record
    peak_bytes: int | None  # the most that one device held, where its backend tells
    loss: float  # of the last step

    def summary_s(self) -> Record:
        """Median, 10th and 90th percentile, and all of them."""
        low, median, high = np.percentile(self.step_s, [10, 50, 90])
        return {"median": float(median), "low": float(low), "high": float(high), "all": self.step_s}


_events = Counter[str]()
"""What JAX reports, by name; FOUND: a program in its cache."""
FOUND = "/jax/compilation_cache/cache_hits"

monitoring.register_event_listener(lambda event, **_: _events.update([event]))


def measure(
    step: TrainStep, batches: Iterator[Any], *, warmup: int, steps: int, seed: int,
    on_step: Callable[[int, float], None] = lambda i, seconds: None,
) -> Measurement:  # fmt: skip
    """Run `warmup` untimed and `steps` timed steps from fresh parameters.

    `batches` yields global batches on the mesh; fetching one is part of a step's time, as in training.
    `on_step(i, seconds)` is called after every step, warm-up included, outside the clock.
    """
    state = step.init(jax.random.key(seed))
    batch = next(batches)
    n_found = _events[FOUND]
    started = time.perf_counter()
    lowered = step.step.lower(state, batch)
    with compiler.heard() as warnings:
        compiled, _ = compile_step(lowered, {})
    compile_s = time.perf_counter() - started
    compile_kept = _events[FOUND] > n_found

    times, metrics = [], {}
    for i in range(warmup + steps):
        jax.block_until_ready(state)
        started = time.perf_counter()
        batch = next(batches)
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))
        seconds = time.perf_counter() - started
        on_step(i, seconds)
        if i >= warmup:
            times.append(seconds)
    stats = jax.local_devices()[0].memory_stats() or {}
    return Measurement(
        step_s=times, compile_s=compile_s, compile_kept=compile_kept,
        warnings=None if compile_kept else [w.as_json() for w in compiler.rematerializations(warnings, lowered)],
        memory_bytes=memory.by_class(memory.Stats.of(compiled.memory_analysis()), step),
        peak_bytes=stats.get("peak_bytes_in_use"), loss=float(metrics["loss"]),
    )  # fmt: skip
