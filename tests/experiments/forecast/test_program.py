"""The same program of absent devices is compiled once, also by another process; what is damaged is made again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.compiler import COMPILER_OPTIONS
from experiments.config import RunConfig, train_step
from experiments.forecast import program
from experiments.forecast.rung import ABSENT
from experiments.forecast.topology import devices_of
from experiments.hardware import load
from transformer.sharding import Layout

pytestmark = pytest.mark.deviceless


def forecast(folder: Path, *flags: str) -> dict:
    """In a process of its own: with cuDNN's attention, in whose lowered program JAX leaves the address of a function."""
    flags = (
        "--device=h100-sxm",
        "--devices=8",
        "--model.n_layers=1",
        "--seq_len=128",
        f"--out={folder / 'out'}",
        *flags,
    )
    env = os.environ | {"LADDER_CACHE": str(folder / "cache"), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    command = [sys.executable, "-m", "experiments.forecast", "--preset=tiny", "--json", *flags]
    told = subprocess.run(command, check=True, capture_output=True, env=env, text=True, timeout=300).stdout
    return json.loads(told)[0]


def test_what_was_compiled_is_only_read(tmp_path):
    first, again = forecast(tmp_path), forecast(tmp_path)
    assert (first["compile_kept"], again["compile_kept"]) == (False, True)
    assert first["layout"]["attention"] == "cudnn"
    for key in ("step_s", "breakdown_s", "memory_bytes", "collective_bytes", "warnings"):
        assert first[key] == again[key]
    (kept,) = (tmp_path / "cache" / "programs").iterdir()
    kept.write_bytes(kept.read_bytes()[:1000])
    assert forecast(tmp_path)["compile_kept"] is False
    assert forecast(tmp_path, "--remat=none")["compile_kept"] is False  # another program
    assert len(list((tmp_path / "cache" / "programs").iterdir())) == 2


def test_kernels_of_a_rung_before_change_no_schedule(tmp_path, monkeypatch):
    """The second compiles with the first's kernels at hand, and to what it compiles to without."""
    options = {**COMPILER_OPTIONS["gpu"], **ABSENT["gpu"]}
    run = RunConfig(preset="tiny", model={"n_layers": "1"}, seq_len=128)
    texts = []
    monkeypatch.setattr(program, "default_cache", lambda: tmp_path)
    for n_devices in (8, 16):
        rung, cluster = run.rung(n_devices), devices_of(load().device("h100-sxm"), Layout(data=n_devices))
        step = train_step(run, rung, list(cluster))
        lowered = step.step.lower(step.abstract_state, step.abstract_batch(rung.global_batch_seqs, run.length))
        made, kept = program.program(lowered, options, cluster)
        assert not kept
        assert made.options == options  # of the kernels' file no record tells
        texts.append((made.text, lowered.compile(compiler_options=options).as_text()))
    assert all(with_kernels == without for with_kernels, without in texts)
    assert Path(program._kernels("gpu")["xla_gpu_kernel_cache_file"]).stat().st_size > 0
    assert program._kernels("tpu") == {}
