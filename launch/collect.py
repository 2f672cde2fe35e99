"""Gather the records of a ladder's rungs into one folder, which `cost` and `report` read.

    python -m launch.collect launch/examples/ladder.toml

Takes a moment. Twice gives the same file; records that others have put there stay.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from experiments import entry, records
from launch.spec import LadderSpec, read
from transformer.errors import RequestError


@dataclass(frozen=True)
class Collect:
    file: str = entry.positional("the ladder's TOML file")


def collect(spec: LadderSpec) -> int:
    """Add to OUT/records.jsonl what the rungs have and it has not. Returns how many rungs have no
    readable records, each named on stderr. What is already collected is never lost; of a rung with
    a corrupt line the records before it are taken."""
    gathered = list(records.read_all(spec.folder)) if (spec.folder / records.FILE).is_file() else []
    n_missing = 0
    for job in spec.jobs():
        try:
            gathered += records.read_all(job.folder)
        except RequestError as error:
            n_missing += 1
            print(f"{job.folder.name}: {error}", file=sys.stderr)
    lines = dict.fromkeys(json.dumps(record) for record in gathered)
    if lines:
        records.write_whole(spec.folder / records.FILE, "".join(f"{line}\n" for line in lines))
        print(f"{len(lines)} records in {spec.folder / records.FILE}", flush=True)
    return n_missing


def main(request: Collect) -> int:
    return 1 if collect(read(Path(request.file))) else 0


if __name__ == "__main__":
    entry.start(main, Collect)
