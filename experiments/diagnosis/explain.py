"""The explanation of one rung: before it is compiled, and after."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax

from experiments import memory
from experiments.compiler import compile_step
from experiments.config import RunConfig, train_step
from experiments.diagnosis import collectives, compiler, placed, show
from experiments.forecast import hlo
from transformer.errors import RequestError


def explain(run: RunConfig, n_devices: int, devices: Sequence[jax.Device], options: dict[str, Any]) -> int:
    """Print what the layout places where, then what the compiler makes of it. `options` are the compiler's, beside
    those of a run. 1 where the compiler refuses the step."""
    rung = run.rung(n_devices)
    if rung.failed:
        raise RequestError(rung.failed)
    step, layout = train_step(run, rung, list(devices)), rung.layout
    out = show.console()
    if not run.json:
        out.print(
            f"[bold]{run.preset}[/] on {n_devices:,} x {devices[0].device_kind}: [cyan]{layout}[/], "
            f"{rung.global_batch_seqs:,} sequences of {run.length:,}, microbatches={rung.microbatches}, "
            f"{step.precision}, remat={step.remat}, attention={step.backend}"
            f"{f', experts={step.experts}' if step.config.is_dropless else ''}\n"
        )
    lowered = step.step.lower(step.abstract_state, step.abstract_batch(rung.global_batch_seqs, run.length))
    params = placed.parameters(step, layout)
    constrained = placed.constraints(lowered.as_text(dialect="hlo", debug_info=True), layout)
    rules = placed.rules(params, constrained, layout)
    copies = placed.replicated(params) + placed.replicated(p for p in constrained if p.dims and p.is_activation)
    if not run.json:
        show.before(out, params, constrained, rules, copies)

    failed, sent, classes, warnings = None, [], {}, []
    try:
        with compiler.heard() as warnings:
            made, _ = compile_step(lowered, options)
        classes = memory.by_class(memory.Stats.of(made.memory_analysis()), step)
        text = str(made.as_text())
        known = [*params, *(p for p in constrained if p.dims)]
        sent = collectives.collectives(text, hlo.parse(text), layout, known)
    except jax.errors.JaxRuntimeError as error:  # out of memory on TPUs is one
        failed = " ".join(str(error).split())[:300]
    warned = compiler.rematerializations(warnings, lowered)
    if run.json:
        found = {
            "preset": run.preset, "layout": str(layout), "n_devices": n_devices, "failed": failed,
            "parameters": [p.as_json() for p in params], "activations": [p.as_json() for p in constrained],
            "rules": [dataclasses.asdict(r) | {"outcome": r.outcome} for r in rules],
            "replicated": [dataclasses.asdict(r) | {"cost_bytes": r.cost_bytes} for r in copies],
            "memory_bytes": classes, "collectives": [c.as_json() for c in sent],
            "rematerializations": [w.as_json() for w in warned],
        }  # fmt: skip
        print(json.dumps(found))
    else:
        show.after(out, sent, warned, classes)
    if failed:
        print(f"error: the compiler refuses the step: {failed}", file=sys.stderr)
    return 1 if failed else 0
