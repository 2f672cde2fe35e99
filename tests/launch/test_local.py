"""Real processes, joined by jax.distributed on loopback."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import records
from launch import collect, local, spec

WORKER = Path(__file__).with_name("worker.py")


def ladder(folder: Path, devices: list[int], fate: list[str]) -> tuple[spec.LadderSpec, list[spec.Job]]:
    """Rungs of two virtual devices a process whose processes run the test's worker."""
    read = spec.parse(
        {
            "name": "test",
            "out": str(folder),
            "devices": devices,
            "devices_per_process": 2,
            "env": {"JAX_PLATFORMS": "cpu"},
        }
    )
    jobs = [dataclasses.replace(job, argv=(sys.executable, str(WORKER), str(job.folder), *fate)) for job in read.jobs()]
    return read, jobs


@pytest.mark.smoke
def test_two_processes_are_one_mesh_and_rungs_are_collected(tmp_path, capsys):
    read, jobs = ladder(tmp_path, [2, 4], ["well"])
    assert local.submit(jobs, tmp_path) == 0
    assert collect.collect(read) == 0
    assert [record["n_devices"] for record in records.read(tmp_path)] == [2, 4]
    for rank in (0, 1):
        log = (tmp_path / "rung-0004" / f"rank-{rank}.log").read_text()
        assert f"[{rank}] step 5: sum 4.0 in 2 processes" in log
        assert all(line.startswith(f"[{rank}] ") for line in log.splitlines())
    assert "[0] step 5: sum 4.0 in 2 processes" in capsys.readouterr().out


@pytest.mark.parametrize("unlucky", [0, 1])
@pytest.mark.parametrize(("fate", "how"), [("raise", "ended with exit code 1"), ("kill", "was killed by SIGKILL")])
def test_dead_rank_ends_the_job_and_is_named(tmp_path, capsys, fate, how, unlucky):
    _, (job,) = ladder(tmp_path, [4], [fate, str(unlucky)])
    started = time.monotonic()
    assert local.submit([job], tmp_path) == 1
    assert time.monotonic() - started < 60  # JAX by itself: 100 s, or for ever
    said = capsys.readouterr().err
    assert f"rung-0004: rank {unlucky} {how}; the end of {job.folder}/rank-{unlucky}.log:" in said
    assert f"[{unlucky}] step 2: sum 4.0" in said
    assert (f"RuntimeError: rank {unlucky} dies on purpose" in said) == (fate == "raise")
    assert not (job.folder / records.FILE).exists()


def test_rungs_after_a_failed_one_are_tried(tmp_path, capsys):
    read, jobs = ladder(tmp_path, [2, 4], ["well"])
    broken = dataclasses.replace(jobs[0], argv=(sys.executable, "-c", "raise SystemExit(3)"))
    assert local.submit([broken, jobs[1]], tmp_path) == 1
    assert collect.collect(read) == 1
    assert [record["n_devices"] for record in records.read(tmp_path)] == [4]
    said = capsys.readouterr().err
    assert "rung-0002: rank 0 ended with exit code 3" in said
    assert "rung-0002: no records.jsonl" in said


def test_what_a_rank_has_started_ends_with_it(tmp_path):
    _, (job,) = ladder(tmp_path, [4], [])
    script = (
        'if [ "$LADDER_PROCESS_ID" = 1 ]; then while [ ! -s "$0" ]; do sleep 0.05; done; exit 7; fi\n'
        'trap "" TERM; sleep 600 & echo $! > "$0.new"; mv "$0.new" "$0"; wait'
    )
    stubborn = dataclasses.replace(job, argv=("bash", "-c", script, str(tmp_path / "pid")))
    reason = local.run(stubborn, grace_s=0.2)
    assert reason is not None
    assert reason.startswith("rank 1 ended with exit code 7")
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_terminated_launcher_leaves_no_rank_behind(tmp_path):
    file = tmp_path / "ladder.toml"
    rank = tmp_path / "rank.sh"  # stands for the interpreter: gets `-m experiments.ladder ...`
    rank.write_text(f'#!/bin/bash\necho $$ > "{tmp_path}/pid.$LADDER_PROCESS_ID"\nexec sleep 600\n')
    rank.chmod(0o755)
    file.write_text(f'name = "t"\nout = "{tmp_path}/out"\ndevices = [2]\npython = "{rank}"\n')
    launcher = subprocess.Popen([sys.executable, "-m", "launch.submit", str(file)], stdout=subprocess.DEVNULL)
    pids = [tmp_path / "pid.0", tmp_path / "pid.1"]
    until(lambda: all(pid.is_file() and pid.read_text().strip() for pid in pids))
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=60) == 128 + signal.SIGTERM
    until(lambda: not any(alive(int(pid.read_text())) for pid in pids))  # a signal sent is not yet a process gone


def test_interpreter_that_is_not_there(tmp_path):
    _, (job,) = ladder(tmp_path, [2], [])
    reason = local.run(dataclasses.replace(job, argv=("/no/such/python",)))
    assert reason == "cannot run '/no/such/python': No such file or directory"


def test_render_shows_each_rank(tmp_path):
    _, (job,) = ladder(tmp_path, [4], ["it's"])
    first, second = local.render(job).splitlines()
    assert first == (
        "JAX_PLATFORMS=cpu LADDER_N_PROCESSES=2 JAX_NUM_CPU_DEVICES=2 LADDER_COORDINATOR=127.0.0.1:PORT "
        f"LADDER_PROCESS_ID=0 LADDER_LOCAL_DEVICE_IDS=0,1 {sys.executable} {WORKER} {job.folder} 'it'\"'\"'s'"
    )
    assert "LADDER_PROCESS_ID=1 LADDER_LOCAL_DEVICE_IDS=2,3" in second
    assert not job.folder.exists()


def alive(pid: int) -> bool:
    """A zombie that init has not reaped yet is dead."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, os.times()
        time.sleep(0.05)
