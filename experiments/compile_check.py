"""Published runs at their own layouts and device counts, compiled without the hardware: what they send, against what
their layouts should send.

    python -m experiments.compile_check --out=runs/compile_check

Ten to thirty seconds a run for GPUs on a free core, one to three minutes for TPUs; the same command goes on where it
was stopped. The runs and their sources are in `experiments/published/layouts.toml`. A run whose layout the model here
cannot have is listed with the reason.
"""

import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from experiments import attached, entry, records, show
from experiments.config import RunConfig
from experiments.entry import flag
from experiments.forecast.rung import forecast
from experiments.forecast.topology import devices_of
from experiments.forecast.traffic import off, small
from experiments.hardware import load
from experiments.records import Record, check_out, layout_text
from transformer.errors import RequestError, nearest


@dataclass(frozen=True, kw_only=True)
class Request:
    """`python -m experiments.compile_check`"""

    presets: tuple[str, ...] = flag((), "which, with commas between; default: all that have a published run")
    out: str = flag("runs/compile_check", "the folder for records and table.md")

    def __post_init__(self) -> None:
        known = [run["preset"] for run in published()]
        for name in self.presets:
            if name not in known:
                raise RequestError(f"--presets: {name!r} has no published run here: {nearest(name, known)}")


def published() -> list[Mapping[str, Any]]:
    """The largest published run of each preset, with its source."""
    text = resources.files("experiments").joinpath("published/layouts.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["run"]


def main(request: Request) -> int:
    attached.hide_all()
    out = Path(request.out)
    check_out(out)
    path = out / records.FILE
    done = list(records.read(out)) if path.exists() else []
    runs = [run for run in published() if not request.presets or run["preset"] in request.presets]
    found = []
    with show.Progress("published runs", total=len(runs)) as progress:
        for run in runs:
            with progress.rung(run["preset"], steps=2) as advance:
                record = next((r for r in done if r.get("published") == run), None)
                if record is None:
                    record = _compiled(run, advance) | {"published": run}
                    if "asked" not in record:  # what is refused has no rung to keep a record of
                        records.append(out, record)
            found.append(record)
    table = "\n".join([_line(HEAD), _line(["---"] * len(HEAD)), *(_line(_row(r)) for r in found)])
    records.write_whole(out / "table.md", table + "\n")
    print(table)
    unequal = [r for r in found if off(r.get("collectives", {}))]
    for record in unequal:
        for line in off(record["collectives"]):
            print(f"{record['preset']}: {line}", file=sys.stderr)
    return 1 if unequal else 0


def config_of(run: Mapping[str, Any]) -> RunConfig:
    """The run as one of ours. RequestError if the model here cannot have its layout."""
    asked = {k: run[k] for k in ("preset", "layout", "global_batch_seqs", "micro_batch_seqs", "remat", "seq_len")}
    return RunConfig(**asked, model=run.get("model", {}))


def _compiled(run: Mapping[str, Any], advance: show.Advance) -> Record:
    device = load().device(run["device"])
    try:
        config = config_of(run)
        rung = config.rung(run["devices"])
        record = forecast(config, rung, device, devices_of(device, rung.layout), advance)
    except RequestError as error:
        named = {"preset": run["preset"], "device": device.slug, "n_devices": run["devices"], "source": run["source"]}
        return named | {"failed": str(error), "asked": run["layout"]}
    return record | {"source": run["source"]}


HEAD = [
    "preset",
    "source",
    "devices",
    "layout",
    "compiles in",
    "memory, GB",
    "sent a step, GB: compiled (of closed form)",
]


def _row(r: Record) -> list[str]:
    where = [f"`{r['preset']}`", r["source"], f"{r['n_devices']:,} {r['device']}"]
    if r["failed"]:
        layout = r["asked"] if "asked" in r else layout_text(r["layout"])
        return [*where, f"`{layout}`", "refused" if "asked" in r else "fails", "", r["failed"].replace("|", "/")[:200]]
    memory = r["memory_bytes"]
    fits = "" if r["fits"] else f", more than {memory['limit'] / 1e9:.0f}"
    return [
        *where, f"`{layout_text(r['layout'])}` x {r['layout']['microbatches']}", f"{r['compile_s']:.0f} s",
        f"{memory['total'] / 1e9:.0f}{fits}", sent(r["collectives"]),
    ]  # fmt: skip


def sent(collectives: Mapping[str, Mapping[str, Any]]) -> str:
    """By axis and kind, what is small left out."""
    least = small(collectives)
    return "; ".join(
        f"{key} {c['measured'] / 1e9:.3g} ({'none' if c['ratio'] is None else format(c['ratio'], '.3f')})"
        for key, c in collectives.items()
        if max(c["measured"], c["closed_form"]) > least
    )


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    entry.start(main, Request)
