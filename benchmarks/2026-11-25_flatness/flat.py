"""What it costs to compile a step for more devices and more layers: processor seconds and memory of a whole process.

python benchmarks/2026-11-25_flatness/flat.py
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
DEVICES = {8: "tensor=8", 64: "fsdp=8,tensor=8", 512: "fsdp=64,tensor=8", 1024: "fsdp=128,tensor=8"}
DEVICES |= {n: f"data={n // 1024},fsdp=128,tensor=8" for n in (4096, 16384, 40960)}
LAYERS = (6, 12, 24, 48, 96)


def cost(n_devices: int, layout: str, n_layers: int) -> dict:
    """One forecast in a process of its own, nothing kept from before."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "experiments.forecast", "--preset=gpt3-175b", "--device=h100-sxm",
            f"--devices={n_devices}", f"--layout={layout}", f"--model.n_layers={n_layers}", f"--out={folder}", "--json",
        ]  # fmt: skip
        env = os.environ | {"LADDER_CACHE": folder, "JAX_ENABLE_COMPILATION_CACHE": "false"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, text=True) as child:
            assert child.stdout is not None
            (record,) = json.loads(child.stdout.read())
            _, status, used = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
    return {
        "n_devices": n_devices, "layout": layout, "n_layers": n_layers, "cpu_s": used.ru_utime + used.ru_stime,
        "host_gb": used.ru_maxrss * 1024 / 1e9, "compile_s": record["compile_s"], "step_s": record["step_s"]["median"],
    }  # fmt: skip


def main() -> None:
    asked = [(n, layout, 96) for n, layout in DEVICES.items()] + [(1024, DEVICES[1024], n) for n in LAYERS[:-1]]
    with (HERE / "results.jsonl").open("w") as file:
        for one in asked:
            found = cost(*one)
            file.write(json.dumps(found) + "\n")
            file.flush()
            print(found, flush=True)


if __name__ == "__main__":
    main()
