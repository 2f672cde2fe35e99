"""Simulated against measured: one CPU core, five shapes of model, from a calibration made in the same process.

    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false PYTHONPATH=. taskset -c 0 \\
        python benchmarks/2026-11-25_cpu_simulated/compare.py

Takes two minutes. Both sides count seconds of the processor, not of the clock on the wall: the machine is shared, XLA
runs on one thread, and a step's wall time here is that of its neighbours.
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
from experiments.hardware import Device, load
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


def compare(shape: dict[str, int], device: Device) -> dict:
    run = TextRunConfig(preset="tiny", model={k: str(v) for k, v in shape.items()}, micro_batch_seqs=4)
    rung = run.rung(1)
    step = train_step(run, rung, jax.devices()[:1])
    compiled = step.step.lower(step.abstract_state, step.abstract_batch(rung.global_batch_seqs, run.length)).compile()
    forecast = Simulator(hlo.parse(compiled.as_text()), Rates(device), Fabric(device), rung.layout).run()
    batch = next(step.place(batch, rung.global_batch_seqs) for batch in run.batches(rung, step, "train"))
    state, seconds = step.init(jax.random.key(0)), []
    for _ in range(2 + STEPS):
        jax.block_until_ready(state)
        started = time.process_time()
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.process_time() - started)
    measured_s = float(np.median(seconds[2:]))
    return {
        "shape": shape, "simulated_s": forecast.compute_s, "measured_s": measured_s, "all_s": seconds[2:],
        "ratio": forecast.compute_s / measured_s, "breakdown_s": dict(forecast.breakdown_s),
    }  # fmt: skip


def main() -> None:
    attached.hide_all()
    device = load().device("cpu")
    timing = Timing(loop_s=0.05, loops=5, clock=time.process_time)
    found = dict(calibrate.measured(device, calibrate.PLANS["cpu"], timing))
    records.write_whole(HERE / calibrate.FILE, calibrate.text_of(device, "cpu", found))
    device = load(HERE / calibrate.FILE).device("cpu")
    made = records.provenance() | {"command": f"python {Path(__file__).name}"}
    rows = [compare(shape, device) | made for shape in SHAPES]
    (HERE / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        times = f"simulated {row['simulated_s']:.4f} s, measured {row['measured_s']:.4f} s"
        print(f"{row['shape']}: {times}, {row['ratio']:.2f}")


if __name__ == "__main__":
    main()
