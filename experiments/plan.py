"""The best layout for a model on so many devices, among all that it can have; and the cheapest rung for a run.

    python -m experiments.plan --preset=llama3-405b --device=h100-sxm --devices=16384 --batch_tokens=16M
    python -m experiments.plan --preset=llama3-8b --devices=64,128 --batch_tokens=4M --tokens=1e12 --deadline_days=30

Tries every layout, remat and micro-batch in closed form (ten thousand a second), drops what does not fit, and compiles
and simulates the best few. About a minute for 16,384 GPUs on two cores; --simulate=0 compiles nothing.
"""

import dataclasses
import json
import math
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments import attached, cost, entry, records, show
from experiments.config import RunConfig, layout_of
from experiments.entry import flag, overrides
from experiments.forecast.rung import forecast
from experiments.forecast.topology import devices_of
from experiments.hardware import Device, load
from experiments.planning import tables
from experiments.planning.rungs import Plan, Row, cheapest, record, row, rung
from experiments.planning.search import Option, Search, families, front, lean, of_layouts
from experiments.planning.space import fed, splits
from transformer.errors import RequestError

FILE = "plan.jsonl"
SHOWN = 12
"""Rows of a table; the file has all."""
COSTS = (
    lambda at: at[1].step_s,
    lambda at: at[1].total_bytes,
    lambda at: at[1].step_s * at[1].n_devices,
)
"""Time, memory and device-seconds of a plan's option."""


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """`python -m experiments.plan`"""

    preset: str = flag("tiny", "the model, by its slug")
    model: Mapping[str, str] = overrides("model", "a key of ModelConfig, as in --model.n_layers=12")
    device: str = flag("h100-sxm", "the accelerator, by its slug in hardware.toml")
    devices: tuple[int, ...] = flag((8,), "device counts, with commas between")
    batch_tokens: str = flag("", "tokens of a step: 16777216, or 16M, where k, M, B are powers of 1,024")
    seq_len: int | None = flag(None, "tokens in a sequence; default: the preset's max_len")
    precision: Literal["auto", "bf16", "f32", "fp8", "int8"] = flag("auto", "of compute, as in experiments.forecast")
    most_tensor: int | None = flag(None, "widest tensor axis; default: a node's devices")
    fill: float = flag(0.9, "share of the memory that an option may take in closed form, which knows no temporaries")
    beside: str = flag("", "a layout to stand beside those that are found, such as its authors': pipeline=16,tensor=8")
    simulate: int = flag(3, "options of each device count that are compiled and simulated, with --beside; 0 for none")
    tokens: float | None = flag(None, "token budget of a whole run, such as 15e12")
    budget_usd: float | None = flag(None, "the most that the run may cost, with failures")
    deadline_days: float | None = flag(None, "the longest that the run may take, with failures")
    term: Literal["on_demand", "spot"] = flag("on_demand", "which of the known prices")
    usd_per_device_h: float | None = flag(None, "your own price, instead of the known ones")
    out: str = flag("runs/plan", f"the folder for {FILE} and records.jsonl")
    facts: str | None = flag(None, "a TOML file that adds to or overrides hardware facts and prices")
    json: bool = flag(False, "print the plan as JSON on standard output, all else on standard error")

    def __post_init__(self) -> None:
        if not self.devices or min(self.devices) < 1:
            raise RequestError(f"--devices={','.join(map(str, self.devices))}: expected counts such as 64,1024")
        if self.simulate < 0:
            raise RequestError(f"--simulate={self.simulate}: expected 0 or more")
        if not 0 < self.fill <= 1:
            raise RequestError(f"--fill={self.fill:g}: expected a share above 0, at most 1")
        for name in ("tokens", "budget_usd", "deadline_days", "usd_per_device_h", "most_tensor"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise RequestError(f"--{name}={value:g}: expected a number above 0")
        limit = next((n for n in ("budget_usd", "deadline_days") if getattr(self, n) is not None), None)
        if limit and self.tokens is None:
            raise RequestError(f"--{limit} is of a whole run: give its --tokens too, such as --tokens=15e12")

    def run(self, option: Option | None = None) -> RunConfig:
        """The experiment, with an option's layout and batch."""
        base = RunConfig(preset=self.preset, model=self.model, seq_len=self.seq_len, precision=self.precision)
        if option is None:
            return base
        return dataclasses.replace(
            base, layout=str(option.layout), remat=option.remat, micro_batch_seqs=option.micro_batch_seqs,
            global_batch_seqs=option.global_batch_seqs,
        )  # fmt: skip

    def command(self, option: Option, verb: str) -> str:
        """What runs an option by itself."""
        flags = {
            "preset": self.preset, **{f"model.{key}": value for key, value in self.model.items()},
            "device": self.device if verb == "forecast" else None, "devices": option.n_devices,
            "layout": option.layout, "seq_len": self.run().length, "global_batch_seqs": option.global_batch_seqs,
            "micro_batch_seqs": option.micro_batch_seqs, "remat": option.remat,
            "precision": None if self.precision == "auto" else self.precision, "facts": self.facts,
        }  # fmt: skip
        return shlex.join(
            ["python", "-m", f"experiments.{verb}", *(f"--{k}={v}" for k, v in flags.items() if v is not None)]
        )


def main(request: PlanRequest) -> int:
    attached.hide_all()
    out = Path(request.out)
    records.check_out(out)
    facts = load(request.facts)
    device, run = facts.device(request.device), request.run()
    run.check_rate(device)
    batch_seqs = sequences(request.batch_tokens, run.length)
    search = Search(run, device, request.fill)
    plans = [_plan(request, search, device, n, batch_seqs) for n in request.devices]
    for plan in plans:
        _simulate(request, plan, device, out)

    best = [(plan, winner) for plan in plans if (winner := plan.winner)]
    told = [plan.simulated.get(o) or record(o, request.run(o), search, device) for plan, o in best]
    priced = cost.rows(told, facts, tokens=request.tokens, term=request.term, usd_per_device_h=request.usd_per_device_h)
    price = next((one["usd_per_device_h"]["median"] for one in priced if one["usd_per_device_h"]), None)

    def as_rows(options: list[Option], plan: Plan) -> list[Row]:
        return [row(option, plan, run, price) for option in options]

    everything = [one for plan in plans for one in as_rows(of_layouts(plan.found), plan)]
    records.write_whole(out / FILE, "".join(json.dumps(one) + "\n" for one in everything))
    rungs = [
        rung(one, option, budget_usd=request.budget_usd, deadline_days=request.deadline_days)
        for one, (_, option) in zip(priced, best, strict=True)
    ]
    pareto = front(((plan, option) for plan in plans for option in lean(plan.found.fitting)), *COSTS)
    said = {
        "preset": request.preset, "device": device.slug, "batch_tokens": batch_seqs * run.length,
        "tried": sum(plan.found.n_tried for plan in plans), "fit": sum(len(plan.found.fitting) for plan in plans),
        "front": [one for plan, option in pareto for one in as_rows([option], plan)],
        "best": [
            one | {"command": request.command(option, "forecast"), "measure": request.command(option, "ladder")}
            for plan, option in best for one in as_rows([option], plan)
        ],
        "simulated": [one for plan in plans for one in as_rows(list(plan.simulated), plan)],
        "beside": [one for plan in plans if plan.beside for one in as_rows([plan.beside], plan)],
        "families": [one for plan in plans for one in as_rows(list(families(plan.found)), plan)],
        "rungs": rungs if request.tokens else [],
        "chosen": cheapest(rungs) if request.tokens else None,
    }  # fmt: skip
    if request.json:
        json.dump(said, sys.stdout, indent=1)
        print()
    else:
        _show(said, request)
    return (
        1 if any(one["failed"] and one.get("fits") is not False for p in plans for one in p.simulated.values()) else 0
    )


def sequences(batch_tokens: str, length: int) -> int:
    """Sequences of a batch of so many tokens. RequestError: no number, or not whole sequences."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kMB]?)", batch_tokens)
    if not found:
        raise RequestError(f"--batch_tokens={batch_tokens}: expected tokens of a step, such as 16777216 or 16M")
    tokens = float(found[1]) * 1024 ** " kMB".index(found[2] or " ")
    if tokens % length or not tokens:
        near = max(1, round(tokens / length)) * length
        raise RequestError(
            f"--batch_tokens={batch_tokens} is {tokens:,.0f} tokens, not whole sequences of {length:,}; nearest: {near}"
        )
    return int(tokens) // length


def _plan(request: PlanRequest, search: Search, device: Device, n_devices: int, batch_seqs: int) -> Plan:
    run = search.run
    slices = max(1, math.ceil(n_devices / (device.pod_devices or n_devices)))  # beyond a pod only gradients travel
    if n_devices % slices:
        raise RequestError(f"--devices={n_devices}: {slices} pods of {device.slug} do not share them evenly")
    node = search.device.scaleup_devices or search.device.devices_per_node or n_devices
    known = splits(
        run.resolved_model, n_devices, length=run.length, batch_seqs=batch_seqs, slices=slices,
        most_tensor=request.most_tensor or min(node, search.device.devices_per_node or node),
    )  # fmt: skip
    plan = Plan(n_devices, search.best(known, batch_seqs))
    show.remark(f"{n_devices:,} devices: {plan.found.n_tried:,} options, {len(plan.found.fitting):,} fit")
    if not plan.found.n_tried:
        raise RequestError(
            f"--devices={n_devices}: no layout has data shards that divide {batch_seqs} sequences; "
            "give another --batch_tokens or count"
        )
    if request.beside:
        layout = layout_of(request.beside, n_devices)
        fed_so = fed(run.resolved_model, layout, length=run.length, batch_seqs=batch_seqs)
        beside = search.best(fed_so, batch_seqs)
        plan.beside = beside.fitting[0] if beside.fitting else next(iter(beside.smallest.values()))
    return plan


def _simulate(request: PlanRequest, plan: Plan, device: Device, out: Path) -> None:
    """The best of those that differ in what a device computes, and the layout beside them."""
    options = list({option.bones: option for option in reversed(plan.found.fitting)}.values())
    options = sorted(options, key=lambda option: option.step_s)[: request.simulate]
    if request.simulate and plan.beside and plan.beside.fits and plan.beside not in options:
        options.append(plan.beside)
    if not options:
        return
    cluster = devices_of(device, options[0].layout)
    with show.Progress(f"{request.preset} on {plan.n_devices:,} {device.slug}", total=len(options)) as progress:
        for option in options:
            with progress.rung(str(option.layout), steps=2) as advance:
                run = request.run(option)
                plan.simulated[option] = forecast(run, run.rung(plan.n_devices), device, cluster, advance)
            records.append(out, plan.simulated[option])


def _show(said: dict[str, Any], request: PlanRequest) -> None:
    title = f"{said['preset']} on {said['device']}, {said['batch_tokens']:,} tokens a step"
    if said["front"]:
        more = "" if len(said["front"]) <= SHOWN else f", the first {SHOWN} of {len(said['front'])}"
        tables.show(f"{title}: best in time, memory or cost (Pareto{more})", tables.OPTIONS, said["front"][:SHOWN])
    if said["simulated"]:
        tables.show("compiled and simulated", tables.OPTIONS, said["simulated"])
    if said["beside"]:
        tables.show("beside them", tables.OPTIONS, said["beside"])
    fits = [one for one in said["families"] if one["fits"]][:SHOWN]
    does_not = [one for one in said["families"] if not one["fits"]][:SHOWN]
    tables.show("why the others lose: the best of each set of axes", tables.OPTIONS, fits + does_not)
    if said["rungs"]:
        tables.show(f"whole run of {request.tokens:,.4g} tokens", tables.RUNGS, said["rungs"])
    tables.lines(_conclusions(said, request))


def _conclusions(said: dict[str, Any], request: PlanRequest) -> Iterator[str]:
    yield f"{said['tried']:,} options, of which {said['fit']:,} fit in {request.fill:.0%} of the memory"
    chosen = said["chosen"]
    limited = request.budget_usd is not None or request.deadline_days is not None
    if limited and chosen is None:
        yield "no rung makes it"
    if chosen:
        price = f", {chosen['usd']:,.0f} USD" if chosen["usd"] else ""
        yield f"cheapest that makes it: {chosen['n_devices']:,} devices, {chosen['days']:.4g} days{price}"
    for one in said["best"]:
        if chosen and one["n_devices"] != chosen["n_devices"]:
            continue
        simulated = f"{one['simulated_step_s']:.4g} s simulated, " if one["simulated_step_s"] else ""
        yield f"best on {one['n_devices']:,}: {one['layout']}, {simulated}{one['step_s']:.4g} s in closed form"
        if said["simulated"] and not one["simulated_step_s"]:
            yield "  in doubt: none of those that were simulated fits; more with --simulate, or less --fill"
        yield f"  forecast it: {one['command']}"
        yield f"  measure it, where they are attached: {one['measure']}"
    for n in request.devices:
        if n not in {one["n_devices"] for one in said["best"]}:
            yield f"nothing fits on {n:,} devices"


if __name__ == "__main__":
    entry.start(main, PlanRequest)
