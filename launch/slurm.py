"""Slurm: one sbatch file a rung. `render` is a pure function of the job; `submit` calls sbatch.

The failure rules (each seen on Slurm 22.05 with JAX 0.10 and 0.12, see docs/cluster.md):
`--kill-on-bad-exit=1`, or the peers of a dead rank hang until JAX's heartbeat gives up; `--requeue`
for lost nodes; exit code 85 for a run that saved its state because it was asked to leave, which the
job itself must requeue, since Slurm takes a job that ends by itself for finished.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.records import write_whole
from launch.spec import Job
from transformer.errors import RequestError

JOBS_FILE = "jobs.json"

_TEMPLATE = """\
#!/bin/bash
{directives}
set -e

{setup}{env}
# Rank 0 is on the first node. The port is above the ports that Linux hands out by itself, and jobs
# that share a node get different ones.
LADDER_COORDINATOR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((61440 + SLURM_JOB_ID % 4096))"
export LADDER_COORDINATOR

code=0
srun --kill-on-bad-exit=1 --distribution=block {srun} \\
  bash -c {rank} rank \\
  {command} || code=$?

# 85: the run saved its state because it was asked to leave. Slurm would call the job finished.
if [ "$code" = 85 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def render(job: Job) -> str:
    """The sbatch file: bash and Slurm's own directives, every value quoted for its reader."""
    log = str(job.folder).replace("%", "%%")
    srun = [f"--output={log}/rank-%t.log", "--open-mode=append"]
    if "cpus_per_task" in job.slurm.options:  # srun of Slurm 22.05 to 23.02 does not inherit it from sbatch
        srun.append(f"--cpus-per-task={job.slurm.options['cpus_per_task']}")
    return _TEMPLATE.format(
        directives="\n".join(f"#SBATCH {directive}" for directive in _directives(job, log)),
        setup="".join(f"{line}\n" for line in job.slurm.setup) + ("\n" if job.slurm.setup else ""),
        env="".join(f"export {key}={shlex.quote(value)}\n" for key, value in job.shared_env().items()),
        srun=shlex.join(srun),
        rank=shlex.quote(_rank_script(job.devices_per_process)),
        command=shlex.join(job.argv),
    )


def _directives(job: Job, log: str) -> Iterator[str]:
    n_nodes = -(-job.n_processes // job.processes_per_node)
    yield f"--job-name={_quote(job.name)}"
    yield f"--output={_quote(f'{log}/job.log')}"
    yield "--open-mode=append"
    yield "--requeue"
    yield "--dependency=singleton"  # submitted twice, a rung still runs once at a time
    yield f"--nodes={n_nodes}"
    yield f"--ntasks={job.n_processes}"
    yield f"--ntasks-per-node={job.processes_per_node}"
    for key, value in job.slurm.options.items():
        name = key.replace("_", "-")
        yield f"--{name}" if value is True else f"--{name}={_quote(str(value))}"
    yield from job.slurm.extra


def _quote(text: str) -> str:
    """Slurm reads its directives itself: unlike a shell it honours the backslash in either quote."""
    if re.fullmatch(r"[A-Za-z0-9_./:,@%+=-]+", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _rank_script(devices_per_process: int) -> str:
    """What differs by rank. The local ids are explicit: JAX would otherwise give a process of a
    Slurm job one GPU, however many it was meant to drive."""
    first = f"$((SLURM_LOCALID * {devices_per_process}))"
    last = f"$((SLURM_LOCALID * {devices_per_process} + {devices_per_process - 1}))"
    ids = f'LADDER_LOCAL_DEVICE_IDS="$(seq -s, {first} {last})"'
    return f'export LADDER_PROCESS_ID="$SLURM_PROCID" {ids}; exec "$@"'


def submit(jobs: Sequence[Job], folder: Path) -> int:
    """Write and submit one sbatch file a rung, and note the job ids in `folder`/jobs.json.

    Returns how many rungs sbatch refused; its words go to stderr. RequestError without sbatch.
    """
    if shutil.which("sbatch") is None:
        raise RequestError(
            "sbatch is not on PATH: submit from a login node of a Slurm cluster, or use --cluster=local or --dry_run"
        )
    n_refused = 0
    for job in jobs:
        script = job.folder / "job.sbatch"
        write_whole(script, render(job))
        answer = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
        if answer.returncode:
            n_refused += 1
            print(f"{job.folder.name}: sbatch refused {script}: {answer.stderr.strip()}", file=sys.stderr)
            continue
        job_id = answer.stdout.strip().split(";")[0]  # "id" or "id;cluster"
        _note(folder / JOBS_FILE, job.folder.name, job_id)
        print(f"{job.folder.name}: job {job_id}", flush=True)
    return n_refused


def _note(path: Path, rung: str, job_id: str) -> None:
    """After each job, not after all: an interrupted submission loses no id."""
    jobs = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_whole(path, json.dumps(jobs | {rung: job_id}, indent=2) + "\n")
