"""Rungs of virtual devices, simulated against measured: 1, 2, 4 and 8 of them on one CPU core, weak and strong scaling.

    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false JAX_NUM_CPU_DEVICES=8 PYTHONPATH=. taskset -c 0 \\
        python benchmarks/2026-11-25_cpu_simulated/virtual.py

A forecast takes each device for a machine of its own. Virtual ones share one core, which does their work one after
another: simulated is what one computes, times their number, and what it waits for collectives, which were calibrated
with all of them on that core. Seconds are of the processor, as in compare.py. Takes three minutes.
"""

import json
import time
from pathlib import Path

import jax
import numpy as np
from compare import STEPS, calibrated

from experiments import attached, records
from experiments.config import TextRunConfig, train_step
from experiments.forecast import hlo
from experiments.forecast.network import Fabric
from experiments.forecast.rates import Rates
from experiments.forecast.simulate import Simulator
from experiments.memory import Stats

HERE = Path(__file__).parent
BATCH = 8  # sequences of the largest rung; under strong scaling of every rung
RUNGS = [
    (scaling, n, layout)
    for scaling in ("weak", "strong")
    for n, layout in ((1, "data=1"), (2, "fsdp=2"), (4, "fsdp=4"), (8, "fsdp=8"))
] + [("strong", 8, "fsdp=2,tensor=4"), ("strong", 8, "data=8")]


def main() -> None:
    attached.hide_all()
    device = calibrated(HERE / "virtual_calibration.toml")
    rows = []
    for scaling, n, layout in RUNGS:
        batch = n if scaling == "weak" else BATCH
        run = TextRunConfig(preset="tiny", seq_len=128, layout=layout, global_batch_seqs=batch, precision="f32")
        rung = run.rung(n)
        step = train_step(run, rung, jax.devices()[:n])
        compiled = step.step.lower(step.abstract_state, step.abstract_batch(batch, run.length)).compile()
        fresh_bytes = Stats.of(compiled.memory_analysis()).temp_size_in_bytes
        simulator = Simulator(
            hlo.parse(compiled.as_text()), Rates(device), Fabric(device), rung.layout, fresh_bytes=fresh_bytes
        )
        found = simulator.run()
        waited_s = sum(s for what, s in found.breakdown_s.items() if what.startswith("exposed"))
        own_s = sum(found.breakdown_s.values()) - waited_s
        state = step.init(jax.random.key(0))
        rows_of = next(step.place(rows, batch) for rows in run.batches(rung, step, "train"))
        all_s = []
        for _ in range(2 + STEPS):
            started = time.process_time()
            state, metrics = compiled(state, rows_of)
            jax.block_until_ready((state, metrics))
            all_s.append(time.process_time() - started)
        rows.append(
            {
                "scaling": scaling, "n_devices": n, "layout": layout, "simulated_s": n * own_s + waited_s,
                "measured_s": float(np.median(all_s[2:])), "all_s": all_s[2:], "breakdown_s": dict(found.breakdown_s),
            }
        )  # fmt: skip
        print({k: v for k, v in rows[-1].items() if k not in ("all_s", "breakdown_s")})
    made = records.provenance() | {"command": f"python {Path(__file__).name}"}
    (HERE / "virtual.jsonl").write_text("".join(json.dumps(row | made) + "\n" for row in rows))


if __name__ == "__main__":
    main()
