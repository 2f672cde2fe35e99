"""Simulated against measured: one CPU core, five shapes of model, each from a calibration made just before.

    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false PYTHONPATH=. taskset -c 0 \\
        python benchmarks/2026-11-25_cpu_simulated/compare.py

Takes six minutes. Both sides count seconds of the processor, not of the clock on the wall: the machine is shared, XLA
runs on one thread, and a step's wall time here is that of its neighbours. What neighbours do to cache and memory they
do to both sides: three rounds of a calibration and the five shapes, and the median of their ratios.
"""

import json
import time
from pathlib import Path

import jax
import numpy as np

from experiments import attached, calibrate, records
from experiments.config import TextRunConfig, train_step
from experiments.forecast import hlo
from experiments.forecast.network import Fabric
from experiments.forecast.rates import Rates
from experiments.forecast.simulate import Simulator
from experiments.forecast.timeline import Timeline
from experiments.hardware import Device, load
from experiments.memory import Stats
from experiments.primitives import Timing

HERE = Path(__file__).parent
SHAPES = (
    {"d_model": 64, "n_layers": 2, "d_ff": 256},
    {"d_model": 128, "n_layers": 8},
    {"d_model": 256, "n_layers": 4, "d_ff": 1024},
    {"d_model": 256, "n_layers": 8, "d_ff": 512, "n_heads": 4, "n_kv_heads": 4},
    {"d_model": 512, "n_layers": 2, "d_ff": 2048},
)
STEPS = 8
ROUNDS = 3


class Case:
    """A shape, compiled; its state is trained on from round to round."""

    def __init__(self, shape: dict[str, int]) -> None:
        run = TextRunConfig(preset="tiny", model={k: str(v) for k, v in shape.items()}, micro_batch_seqs=4)
        rung = run.rung(1)
        step = train_step(run, rung, jax.devices()[:1])
        batch = step.abstract_batch(rung.global_batch_seqs, run.length)
        self.shape, self.layout = shape, rung.layout
        self.compiled = step.step.lower(step.abstract_state, batch).compile()
        self.module = hlo.parse(self.compiled.as_text())
        self.fresh_bytes = Stats.of(self.compiled.memory_analysis()).temp_size_in_bytes
        self.batch = next(step.place(batch, rung.global_batch_seqs) for batch in run.batches(rung, step, "train"))
        self.state = step.init(jax.random.key(0))

    def simulated(self, device: Device) -> Timeline:
        return Simulator(self.module, Rates(device), Fabric(device), self.layout, fresh_bytes=self.fresh_bytes).run()

    def measured_s(self) -> list[float]:
        seconds = []
        for _ in range(2 + STEPS):
            started = time.process_time()
            self.state, metrics = self.compiled(self.state, self.batch)
            jax.block_until_ready((self.state, metrics))
            seconds.append(time.process_time() - started)
        return seconds[2:]


def calibrated(file: Path) -> Device:
    timing = Timing(loop_s=0.05, loops=5, clock=time.process_time)
    found = dict(calibrate.measured(load().device("cpu"), calibrate.PLANS["cpu"], timing))
    records.write_whole(file, calibrate.text_of(load().device("cpu"), "cpu", found))
    return load(file).device("cpu")


def main() -> None:
    attached.hide_all()
    cases = [Case(shape) for shape in SHAPES]
    rows = []
    for n in range(ROUNDS):
        device = calibrated(HERE / calibrate.FILE)
        for case in cases:
            forecast, all_s = case.simulated(device), case.measured_s()
            measured_s = float(np.median(all_s))
            rows.append(
                {
                    "round": n, "shape": case.shape, "simulated_s": forecast.compute_s, "measured_s": measured_s,
                    "ratio": forecast.compute_s / measured_s, "all_s": all_s, "breakdown_s": dict(forecast.breakdown_s),
                }
            )  # fmt: skip
    made = records.provenance() | {"command": f"python {Path(__file__).name}"}
    (HERE / "results.jsonl").write_text("".join(json.dumps(row | made) + "\n" for row in rows))
    for case in cases:
        own = [row for row in rows if row["shape"] == case.shape]
        simulated, measured, ratio = (np.median([r[k] for r in own]) for k in ("simulated_s", "measured_s", "ratio"))
        ratios = ", ".join(f"{row['ratio']:.2f}" for row in own)
        print(f"{case.shape}: simulated {simulated:.4f} s, measured {measured:.4f} s, {ratio:.2f} of {ratios}")


if __name__ == "__main__":
    main()
