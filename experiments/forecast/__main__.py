"""Forecast rungs that are not attached: compile the train step for them and simulate its schedule.

    python -m experiments.forecast --preset=gpt3-175b --device=h100-sxm --devices=1024,8192,40960 \\
        --layout=fsdp=128,tensor=8 --out=runs/forecast

Needs no accelerator, only the compilers (`pip install '.[deviceless]'`). About ten seconds for the first rung of GPUs,
five for each of the next, and a minute for each of TPUs, on two cores. A rung that does not fit is a verdict, not an
error.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from experiments import attached, entry, records, show
from experiments.config import RunConfig
from experiments.entry import flag
from experiments.forecast.rung import forecast
from experiments.forecast.topology import devices_of
from experiments.forecast.traffic import off
from experiments.hardware import load
from experiments.step import chip_of
from transformer.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class ForecastRequest(RunConfig):
    """`python -m experiments.forecast`"""

    device: str = flag("h100-sxm", "the accelerator, by its slug in hardware.toml")
    devices: tuple[int, ...] = flag((8,), "device counts, the rungs, with commas between")
    out: str = flag("runs/forecast", "the folder for records.jsonl")
    trace: bool = flag(False, "write each rung's step as a timeline for ui.perfetto.dev, into --out")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.devices:
            raise RequestError("--devices is empty: expected counts such as 64,1024,40960")


def main(request: ForecastRequest) -> int:
    attached.hide_all()
    records.check_out(Path(request.out))
    device = load(request.facts).device(request.device)
    if device.platform == "cpu":
        attached.at_least(max(request.devices))  # virtual ones: each is a few threads, so not for forecasts of others
    request.check_rate(device)
    rungs = [request.rung(n) for n in request.devices]  # what is wrong with the request is said before any work
    clusters = [devices_of(device, rung.layout) for rung in rungs]
    for remark in request.remarks(chip_of(clusters[0][0]), rungs[0].layout):
        show.remark(remark)

    done = []
    with show.Progress(f"{request.preset} on {device.slug}", total=len(rungs)) as progress:
        for rung, cluster in zip(rungs, clusters, strict=True):
            with progress.rung(f"{rung.n_devices:,} devices", steps=2) as advance:
                name = f"{request.preset}_{device.slug}_{rung.n_devices}.trace.json.gz"
                trace_to = Path(request.out) / name if request.trace else None
                record = forecast(request, rung, device, cluster, advance, trace_to)
            records.append(Path(request.out), record)
            done.append(record)
    show.table(done, as_json=request.json)
    for record in done:
        for line in off(record.get("collectives", {})):
            print(f"{record['n_devices']:,} devices, {line}", file=sys.stderr)
    print(f"{len(done)} records in {Path(request.out) / records.FILE}", file=sys.stderr)
    return 1 if any(r["failed"] and r.get("fits") is not False for r in done) else 0


if __name__ == "__main__":
    entry.start(main, ForecastRequest)
