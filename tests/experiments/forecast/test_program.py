"""The same program of absent devices is compiled once, also by another process; what is damaged is made again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.forecast import rung

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


@pytest.mark.parametrize(
    ("said", "times"), [("INTERNAL: Couldn't find output tile sizes that satisfy hlo", 2), ("no", 1)]
)
def test_what_xla_cannot_tile_is_left_to_cublas(monkeypatch, said, times):
    asked = []

    def program(lowered, options, cluster):
        asked.append(options)
        if "xla_gpu_enable_triton_gemm" in options:
            return "made", False
        raise RuntimeError(said)

    monkeypatch.setattr(rung, "program", program)
    if times == 1:
        with pytest.raises(RuntimeError, match="no"):
            rung._compiled(None, {"a": 1}, [])
    else:
        assert rung._compiled(None, {"a": 1}, []) == ("made", False, {"a": 1, "xla_gpu_enable_triton_gemm": False})
    assert len(asked) == times
