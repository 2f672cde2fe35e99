import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import entry
from launch import submit
from transformer.errors import RequestError

LADDER = 'name = "t"\nout = "out"\ndevices = [2, 4]\npython = "python"\n[env]\nJAX_PLATFORMS = "cpu"\n'


def run(folder: Path, *argv: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.submit", *argv]
    return subprocess.run(command, cwd=folder, env={"PATH": path}, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "ladder.toml").write_text(LADDER)
    return tmp_path


@pytest.mark.parametrize("cluster", ["local", "slurm"])
def test_dry_run_prints_every_job_and_touches_nothing(folder, cluster):
    done = run(folder, "ladder.toml", f"--cluster={cluster}", "--dry_run", path="/nowhere")
    assert (done.returncode, done.stderr) == (0, "")
    for rung, n in (("out/rung-0002", 2), ("out/rung-0004", 4)):
        assert f"==> {rung} <==\n" in done.stdout
        assert f"python -m experiments.ladder --devices={n} --out={rung}" in done.stdout
    assert [path.name for path in folder.iterdir()] == ["ladder.toml"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["none.toml"], "error: cannot read 'none.toml': No such file or directory\n"),
        (["ladder.toml", "--cluster=slrm"], "error: flag --cluster=slrm: value should be one of <local|slurm>\n"),
        (["ladder.toml", "--cluster=slurm"], "error: sbatch is not on PATH"),
        ([], "error: missing argument: the ladder's TOML file\n"),
    ],
)
def test_wrong_request_is_one_line_and_exit_code_2(folder, argv, message):
    done = run(folder, *argv, path="/nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_failed_rungs_end_in_exit_code_1_after_all_were_tried(folder):
    (folder / "ladder.toml").write_text(LADDER.replace('"python"', '"false"'))
    done = run(folder, "ladder.toml")
    assert done.returncode == 1
    assert "rung-0002: rank" in done.stderr
    assert "rung-0004: rank" in done.stderr


def test_local_is_the_default():
    request = entry.parse(submit.Submit, ["x.toml"])
    assert (request.cluster, request.dry_run) == ("local", False)
    with pytest.raises(RequestError):
        entry.parse(submit.Submit, ["x.toml", "--clutser=local"])
