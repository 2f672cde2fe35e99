"""The sbatch text: whole, as bash reads it, and as Slurm reads its directives."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import slurm, spec
from transformer.errors import RequestError

GOLDEN = Path(__file__).parents[1] / "golden" / "ladder_h100.sbatch"
H100 = Path(spec.__file__).parent / "examples" / "h100.toml"

# Stand-ins for Slurm's programs: srun drops its options and runs rank 3, the second of its node.
PROGRAMS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done\nSLURM_PROCID=3 SLURM_LOCALID=1 exec "$@"',
    "scontrol": '[ "$1" = show ] && printf "n7\\nn8\\n" || echo "$*" >> "$CALLS"',
    "sbatch": 'case $2 in *0004*) echo "no such partition" >&2; exit 1;; esac; echo "77;lab"',
}
text = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cf", "Cs", "Zl", "Zp", "Co", "Cn")))
lines = text.filter(str.isprintable)


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bin")
    for name, body in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return folder


def execute(script: str, programs: Path, calls: Path) -> subprocess.CompletedProcess[str]:
    env = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "5000",
        "SLURM_JOB_NODELIST": "n[7-8]",
        "CALLS": str(calls),
    }
    return subprocess.run(["bash", "-s"], input=script, env=env, capture_output=True, text=True, check=False)


def job(**table) -> spec.Job:
    good = {"name": "t", "out": "runs/t", "devices": [8], "devices_per_process": 2, "processes_per_node": 2}
    return spec.parse(good | table).jobs()[0]


def test_whole_text_of_the_64_gpu_rung():
    text = slurm.render(spec.read(H100).jobs()[-1])
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


@pytest.mark.parametrize("rung", spec.read(H100).jobs(), ids=lambda rung: rung.folder.name)
def test_bash_accepts_every_rung(rung):
    subprocess.run(["bash", "-n"], input=slurm.render(rung), text=True, check=True)


@settings(max_examples=25, deadline=None)
@given(flag=lines, value=lines, folder=lines.filter(lambda t: t and "\\" not in t and "\0" not in t))
def test_flags_env_and_folder_arrive_as_written(programs, tmp_path_factory, flag, value, folder):
    asked = job(flags={"text": flag}, env={"VALUE": value}, out=folder)
    show = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
    asked = dataclasses.replace(asked, argv=(sys.executable, "-I", "-c", show, *asked.argv[3:]))
    done = execute(slurm.render(asked), programs, tmp_path_factory.getbasetemp() / "calls")
    assert done.returncode == 0, done.stderr
    argv, env = json.loads(done.stdout)
    assert argv == ["--devices=8", f"--out={asked.folder}", f"--text={flag}"]
    assert env["VALUE"] == value
    ours = {key: env[key] for key in env if key.startswith("LADDER_")}
    assert ours == {
        "LADDER_N_PROCESSES": "4",
        "LADDER_PROCESS_ID": "3",
        "LADDER_COORDINATOR": "n7:62344",  # 61440 + 5000 % 4096
        "LADDER_LOCAL_DEVICE_IDS": "2,3",
    }


@given(value=lines, folder=lines.filter(lambda t: t and "\\" not in t))
def test_directives_are_one_line_each_and_arrive_as_written(value, folder):
    asked = job(slurm={"comment": value}, out=folder)
    directives = [line for line in slurm.render(asked).splitlines() if line.startswith("#SBATCH ")]
    options = [shlex.split(line.removeprefix("#SBATCH ")) for line in directives]
    assert all(len(option) == 1 for option in options)
    assert [f"--comment={value}"] in options
    assert [f"--output={asked.folder}/job.log".replace("%", "%%")] in options


def test_options_that_slurm_needs_said_twice_or_bare():
    text = slurm.render(job(slurm={"cpus_per_task": 7, "exclusive": True, "extra": ["--hint=nomultithread"]}))
    assert "#SBATCH --cpus-per-task=7\n#SBATCH --exclusive\n#SBATCH --hint=nomultithread\n" in text
    assert "rank-%t.log --open-mode=append --cpus-per-task=7 \\\n" in text


@pytest.mark.parametrize(("code", "calls"), [(0, ""), (1, ""), (85, "requeue 5000\n"), (137, "")])
def test_only_a_run_that_saved_its_state_is_requeued(programs, tmp_path, code, calls):
    asked = dataclasses.replace(job(), argv=("bash", "-c", f"exit {code}"))
    done = execute(slurm.render(asked), programs, tmp_path / "calls")
    assert done.returncode == code
    assert ((tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else "") == calls


def test_failed_setup_runs_nothing(programs, tmp_path):
    asked = dataclasses.replace(job(slurm={"setup": ["false"]}), argv=("touch", str(tmp_path / "ran")))
    assert execute(slurm.render(asked), programs, tmp_path / "calls").returncode == 1
    assert not (tmp_path / "ran").exists()


def test_submit_writes_scripts_and_notes_job_ids(programs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    rungs = [job(out=str(tmp_path), devices=[n], devices_per_process=1) for n in (2, 4, 8)]
    assert slurm.submit(rungs, tmp_path) == 1
    assert json.loads((tmp_path / "jobs.json").read_text()) == {"rung-0002": "77", "rung-0008": "77"}
    for rung in rungs:
        assert (rung.folder / "job.sbatch").read_text() == slurm.render(rung)
    assert "rung-0004: sbatch refused" in (said := capsys.readouterr().err)
    assert "no such partition" in said


def test_without_slurm_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RequestError, match="sbatch is not on PATH"):
        slurm.submit([job(out=str(tmp_path / "out"))], tmp_path / "out")
    assert not (tmp_path / "out").exists()
