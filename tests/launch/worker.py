"""One rank of a test's job: joins, sums over the mesh, and the lead leaves a record.

python worker.py OUT well|raise|kill [RANK]     RANK fails in its third step
"""

import os
import signal
import sys
from pathlib import Path

from experiments import distributed, records

distributed.join()

import jax  # noqa: E402  (as in an entry point: nothing touches a device before join)
import jax.numpy as jnp  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402


def main(out: str, fate: str, unlucky: int = -1) -> None:
    n = jax.device_count()
    mesh = jax.make_mesh((n,), ("data",), axis_types=(AxisType.Auto,))
    over_data = PartitionSpec("data")
    psum = jax.jit(
        jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=over_data, out_specs=PartitionSpec())
    )
    ones = jax.make_array_from_callback((n,), NamedSharding(mesh, over_data), lambda index: jnp.ones(n)[index])
    for step in range(1, 6):
        if step == 3 and fate != "well" and jax.process_index() == unlucky:
            if fate == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError(f"rank {unlucky} dies on purpose")
        print(f"step {step}: sum {float(psum(ones)[0])} in {jax.process_count()} processes", flush=True)
    if distributed.is_lead():
        record = {
            "schema": 1, "kind": "measured", "preset": "tiny", "model": {}, "device": "cpu", "n_devices": n,
            "layout": {"data": n}, "scaling": "weak", "seq_len": 8, "step_s": {"median": 0.1, "low": 0.1, "high": 0.1},
        }  # fmt: skip
        records.append(Path(out), record)


main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
