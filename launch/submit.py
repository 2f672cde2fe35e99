"""Run a ladder, one job a rung, here or on a cluster.

    python -m launch.submit launch/examples/ladder.toml --cluster=local
    python -m launch.submit launch/examples/h100.toml --cluster=slurm --dry_run

The first runs `tiny` on 2 and 4 virtual CPU devices in about a minute on two cores, and leaves their
records in runs/tiny-cpu. The second prints the text of every job and touches nothing.
"""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments import entry
from launch import local, slurm
from launch.collect import collect
from launch.spec import read

_CLUSTERS = {"local": local, "slurm": slurm}


@dataclass(frozen=True)
class Submit:
    file: str = entry.positional("the ladder's TOML file")
    cluster: Literal["local", "slurm"] = entry.flag("local", "where the jobs run")
    dry_run: bool = entry.flag(False, "print the text of every job and touch nothing")


def main(request: Submit) -> int:
    spec, cluster = read(Path(request.file)), _CLUSTERS[request.cluster]
    jobs = spec.jobs()
    if request.dry_run:
        print("\n".join(f"==> {job.folder} <==\n{cluster.render(job)}" for job in jobs), end="")
        return 0
    # The default would leave local ranks behind; an exit runs the clean-up that stops them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    n_failed = cluster.submit(jobs, spec.folder)
    if cluster is local and spec.verb == "ladder":
        n_failed += collect(spec)
    return 1 if n_failed else 0


if __name__ == "__main__":
    entry.start(main, Submit)
