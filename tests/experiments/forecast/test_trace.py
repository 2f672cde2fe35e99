"""Timelines: of a schedule worked by hand, of a program that runs here, and against each other."""

import dataclasses
import gzip
import json
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from experiments import compare
from experiments.forecast import trace
from experiments.forecast.hlo import parse
from experiments.forecast.network import Fabric
from experiments.forecast.rates import Rates
from experiments.forecast.simulate import Simulator
from experiments.timelines import differences, module_path, read
from transformer.errors import RequestError
from transformer.sharding import Layout

neighbour = runpy.run_path(str(Path(__file__).with_name("test_simulate.py")))
play, part, body, LOOP, DEVICE = (neighbour[name] for name in ("play", "part", "body", "LOOP", "DEVICE"))

NAMED = (
    "  %d = bf16[1000,1000]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}, "
    'metadata={op_name="jit(_step)/jvp(Model)/decoder/while/body/closed_call/ffn/dot_general"}\n'
)


def events(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)["traceEvents"]


def test_a_loop_of_seven_is_shown_twice_and_counted_seven_times(tmp_path: Path):
    """2 ms of a product, 6 ms of a gather, of which 4 are waited for: 42 ms in all."""
    inside = part("start", "g") + NAMED + part("done", "e", "g")
    timeline = play(LOOP.format(name="w", body="b", n=7), body("b", inside), trace=True)
    trace.write(tmp_path / "t.trace.json.gz", timeline, "by hand")
    found = events(tmp_path / "t.trace.json.gz")
    threads = {e["tid"]: e["args"]["name"] for e in found if e["name"] == "thread_name"}
    slices = [(threads[e["tid"]], e["name"], round(e["ts"]), round(e["dur"])) for e in found if e["ph"] == "X"]
    assert slices == [
        ("compute", "decoder/ffn/dot_general", 0, 2000),
        ("collective fsdp", "g", 0, 6000),
        ("compute", "wait for g", 2000, 4000),
        ("compute", "w, 1 of 7", 0, 6000),
        ("compute", "decoder/ffn/dot_general", 6000, 2000),
        ("collective fsdp", "g", 6000, 6000),
        ("compute", "wait for g", 8000, 4000),
        ("compute", "w, 2 of 7", 6000, 6000),
        ("compute", "w: 5 more as the last", 12_000, 30_000),
    ]
    product = next(e["args"] for e in found if e["name"] == "decoder/ffn/dot_general")
    assert product == {
        "category": "matmul", "hlo_op": "d", "times": 1, "run_id": "0", "flops": 2e9, "bytes": 6e6,
        "tf_op": "jit(_step)/jvp(Model)/decoder/while/body/closed_call/ffn/dot_general",
    }  # fmt: skip
    ledger = read(tmp_path)
    assert {n: (one.seconds, one.count) for n, one in ledger.ran.items()} == {
        "d": (pytest.approx(14e-3), 7), "g": (pytest.approx(42e-3), 7),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("op_name", "path"),
    [
        ("jit(_step)/jvp(Model)/decoder/while/body/closed_call/block_0/ffn/dot", "decoder/block_0/ffn/dot"),
        ("jit(_step)/transpose(jvp(Model))/decoder/checkpoint/ffn/dot", "decoder/ffn/dot (backward)"),
        ("jit(_step)/while/body/cond/branch_1_fun/add", "add"),
        ("", ""),
    ],
)
def test_module_path(op_name: str, path: str):
    assert module_path(op_name) == path


@pytest.fixture(scope="module")
def run_here(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of one program: its simulated timeline, and JAX's profile of three runs on this machine's CPU."""

    @jax.jit
    def model(x: jax.Array, w: jax.Array) -> jax.Array:
        with jax.named_scope("ffn"):
            x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)
        return x * 2

    x, w = jnp.ones((128, 256)), jnp.ones((6, 256, 256))
    compiled = model.lower(x, w).compile()
    compiled(x, w).block_until_ready()
    folder = tmp_path_factory.mktemp("traces")
    with jax.profiler.trace(str(folder / "profile")):
        for _ in range(3):
            compiled(x, w).block_until_ready()
    device = dataclasses.replace(DEVICE, platform="cpu")
    timeline = Simulator(parse(compiled.as_text()), Rates(device), Fabric(device), Layout()).run(trace=True)
    trace.write(folder / "forecast.trace.json.gz", timeline, "forecast")
    return folder / "forecast.trace.json.gz", folder / "profile"


def test_a_forecast_and_a_profile_of_the_same_program_meet_instruction_by_instruction(run_here: tuple[Path, Path]):
    forecast, profile = map(read, run_here)
    assert (profile.program, profile.steps, forecast.steps) == ("jit_model", 3, 1)
    common = forecast.ran.keys() & profile.ran.keys()
    assert len(common) >= 0.8 * len(profile.ran)
    assert {name: round(profile.ran[name].count) for name in common} == {
        name: forecast.ran[name].count for name in common
    }
    assert sum(forecast.ran[name].count == 6 for name in common) >= 2  # what the loop of six runs


def test_modules_that_the_cpu_s_profile_does_not_know_come_from_the_forecast(run_here: tuple[Path, Path]):
    found = differences(*map(read, run_here), by="module")
    assert any(d.name.startswith("ffn/") and d.a_s and d.b_s for d in found)
    assert [abs(d.more_s) for d in found] == sorted((abs(d.more_s) for d in found), reverse=True)


def test_a_timeline_does_not_differ_from_itself(run_here: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    compare.main(compare.Request(a=str(run_here[1]), b=str(run_here[1]), by="instruction", json=True))
    assert {d["more_s"] for d in json.loads(capsys.readouterr().out)} == {0}


def test_the_table_names_what_differs_most(run_here: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    compare.main(compare.Request(a=str(run_here[0]), b=str(run_here[1]), top=1))
    lines = capsys.readouterr().out.splitlines()
    worst = differences(*map(read, run_here), by="module")[0]
    assert worst.name[:30] in lines[2]
    assert f"{1e3 * worst.more_s:+.3f}" in lines[2]


def test_what_is_no_trace_is_refused(tmp_path: Path):
    with pytest.raises(RequestError, match=r"no trace at .*: expected a \*\.trace\.json\.gz"):
        read(tmp_path)
    (tmp_path / "t.trace.json").write_text("[]", encoding="utf-8")
    with pytest.raises(RequestError, match="no trace in Chrome's format"):
        read(tmp_path)
    (tmp_path / "t.trace.json").write_text('{"traceEvents": []}', encoding="utf-8")
    with pytest.raises(RequestError, match="no instructions of a compiled program"):
        read(tmp_path)
