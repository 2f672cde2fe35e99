"""Forecasts end to end: real compiles for clusters that are not there, against closed forms and each other."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from experiments import memory, records
from experiments.compiler import COMPILER_OPTIONS
from experiments.config import RunConfig, train_step
from experiments.forecast import __main__ as verb
from experiments.forecast import groups, hlo, rung
from experiments.forecast.network import Fabric
from experiments.forecast.topology import devices_of
from experiments.hardware import load
from transformer.accounting import hardware_flops_per_token
from transformer.errors import RequestError
from transformer.models import model_params
from transformer.params import leaves
from transformer.sharding import Layout

pytestmark = pytest.mark.deviceless

SCHEMA = {
    *("schema", "kind", "preset", "model", "config", "device", "n_devices", "layout", "scaling", "global_batch_seqs"),
    *(
        "seq_len",
        "step_s",
        "compile_s",
        "tokens_per_s",
        "tokens_per_s_per_device",
        "mfu",
        "hfu",
        "memory_bytes",
        "fits",
    ),
    *("energy_j", "failed", "versions", "commit", "command", "created"),
    *("method", "compiled_for", "breakdown_s", "hidden_s", "facts", "assumed"),
}
GPT2 = {"preset": "gpt2-124m", "model": {"n_layers": "4"}, "seq_len": 512}


def forecast(device: str, n_devices: int, **flags: Any) -> dict[str, Any]:
    run = RunConfig(**flags)
    facts = load().device(device)
    return rung.forecast(run, run.rung(n_devices), facts, devices_of(facts, Layout(data=n_devices)), lambda _: None)


def compiled(device: str, n_devices: int, **flags: Any) -> tuple[Any, Any]:
    """The step and its program, compiled as a forecast compiles it."""
    run = RunConfig(**flags)
    asked = run.rung(n_devices)
    step = train_step(run, asked, list(devices_of(load().device(device), Layout(data=n_devices))))
    lowered = step.step.lower(step.abstract_state, step.abstract_batch(asked.global_batch_seqs, run.length))
    return step, lowered.compile(compiler_options=rung.ABSENT["gpu"])


def traffic(module: hlo.Module, layout: Layout, name: str) -> Counter[tuple[str, str, float]]:
    """Executions of collectives by kind, axis and bytes of the whole, loops multiplied out."""
    found: Counter[tuple[str, str, float]] = Counter()
    computation = module.computations[name]
    for instruction in computation.instructions:
        if instruction.opcode == "while":
            body = instruction.attribute(r"body=%?([\w.\-]+)")
            assert body is not None
            for key, n in traffic(module, layout, body).items():
                found[key] += n * (module.trip_count(instruction) or 1)
        elif instruction.collective:
            group = groups.replica_group(instruction.attributes, layout.n_devices)
            n_bytes = sum(s.n_bytes for s in computation.operand_shapes(instruction))
            n_bytes *= len(group) if instruction.collective == "all-gather" else 1
            found[instruction.collective, groups.axis_of(group, layout), n_bytes] += 1
        else:
            for called in instruction.called:
                found += traffic(module, layout, called)
    return found


def traffic_of(device: str, n_devices: int, **flags: Any) -> Counter[tuple[str, str, float]]:
    _, program = compiled(device, n_devices, **flags)
    module = hlo.parse(program.as_text())
    return traffic(module, RunConfig(**flags).rung(n_devices).layout, module.entry)


TINY = {"preset": "tiny", "layout": "fsdp=2,tensor=2"}


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    return forecast("h100-sxm", 16, **TINY)


def most_in_flight(module: hlo.Module) -> int:
    """Collectives that have set out and are not waited for yet, at most, in any computation."""
    most = 0
    for computation in module.computations.values():
        sent: set[str] = set()
        for line in computation.instructions:
            if line.opcode.endswith("-start") and line.collective:
                sent.add(line.name)
            elif line.opcode.endswith("-done"):
                sent -= set(line.operands)
            most = max(most, len(sent))
    return most


@pytest.mark.parametrize(("limit", "most"), [({}, {2, 3, 4}), ({"overlap_limit": 1}, {1})])
def test_weights_set_out_while_another_collective_is_under_way(limit: dict[str, int], most: set[int]):
    """XLA's own limit, 1, leaves the gather of the next weights no place between tensor's collectives."""
    run = RunConfig(**TINY)
    asked = run.rung(16)
    step = train_step(run, asked, list(devices_of(load().device("h100-sxm"), Layout(data=16))))
    lowered = step.step.lower(step.abstract_state, step.abstract_batch(asked.global_batch_seqs, run.length))
    other = {f"xla_gpu_experimental_parallel_collective_{name}": value for name, value in limit.items()}
    text = lowered.compile(compiler_options={**COMPILER_OPTIONS["gpu"], **rung.ABSENT["gpu"], **other}).as_text()
    assert most_in_flight(hlo.parse(text)) in most


def test_record_has_the_schema(tiny: dict[str, Any]):
    records.check(tiny, where="here")
    assert set(tiny) >= SCHEMA
    assert json.loads(json.dumps(tiny, allow_nan=False)) == tiny
    assert (tiny["kind"], tiny["method"], tiny["failed"], tiny["n_devices"]) == ("forecast", "simulated", None, 16)
    assert tiny["compiled_for"] == "NVIDIA H100 80GB HBM3"


def test_breakdown_adds_up_to_the_step(tiny: dict[str, Any]):
    assert sum(tiny["breakdown_s"].values()) == pytest.approx(tiny["step_s"]["median"], rel=1e-6)
    assert set(tiny["breakdown_s"]) >= {"matmul", "attention", "memory", "exposed_tensor"}
    assert min(tiny["breakdown_s"].values()) > 0
    assert min(tiny["hidden_s"].values()) > 0


def test_step_is_a_range_that_says_what_it_rests_on(tiny: dict[str, Any]):
    step_s = tiny["step_s"]
    assert step_s["low"] < step_s["median"] < step_s["high"]
    assert step_s["high"] / step_s["median"] == pytest.approx(step_s["median"] / step_s["low"])
    assert f"times {step_s['high'] / step_s['median']:.3f}, by analogy" in tiny["assumed"]["step_s_range"]
    assert "80 % of" in tiny["assumed"]["step_s_range"]


def test_utilisations_are_fractions_in_order(tiny: dict[str, Any]):
    assert 0 < tiny["mfu"]["causal"] < tiny["mfu"]["full"] < 1
    assert tiny["mfu"]["causal"] < tiny["hfu"] < 1
    assert tiny["tokens_per_s"] == pytest.approx(tiny["global_batch_seqs"] * 256 / tiny["step_s"]["median"])


def test_memory_classes_are_the_compiler_s(tiny: dict[str, Any]):
    step, program = compiled("h100-sxm", 16, **TINY)
    stats = program.memory_analysis()
    classes = {k: v for k, v in tiny["memory_bytes"].items() if k not in ("total", "limit")}
    total = (
        stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
    )  # fmt: skip
    assert sum(classes.values()) == tiny["memory_bytes"]["total"] == total
    assert memory.by_class(memory.Stats.of(program.memory_analysis()), step) == {
        k: v for k, v in tiny["memory_bytes"].items() if k != "limit"
    }
    assert classes["optimizer"] == pytest.approx(2 * classes["params"], rel=1e-3)  # and its two counters
    sharded = sum(
        4 * _elements(p.shape) // (4 if "embed" in p.dims else 1) for _, p in leaves(model_params(step.config))
    )
    assert classes["params"] == sharded  # matrices over fsdp and tensor, norms nowhere
    assert min(classes.values()) >= 0


def _elements(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def test_the_same_rung_twice_is_the_same(tiny: dict[str, Any]):
    again = forecast("h100-sxm", 16, **TINY)
    for key in ("step_s", "breakdown_s", "hidden_s", "memory_bytes", "mfu", "hfu"):
        assert again[key] == tiny[key]


@pytest.mark.parametrize(
    ("remat", "attention"), [("none", "cudnn"), ("dots", "cudnn"), ("full", "cudnn"), ("full", "xla")]
)
def test_flops_of_the_program_are_the_closed_form_s(remat: Any, attention: Any):
    got = forecast("h100-sxm", 8, **GPT2, layout="fsdp=8", remat=remat, attention=attention)
    config = RunConfig(**GPT2).resolved_model
    assert got["hardware_flops_per_token"] == pytest.approx(
        hardware_flops_per_token(config, 512, remat, attention), rel=0.02
    )
    assert got["layout"]["attention"] == attention


@pytest.mark.parametrize(
    ("layout", "remat"),
    [("data=8", "none"), ("fsdp=8", "full"), ("expert=4,fsdp=2", "dots"), ("pipeline=2,fsdp=4,zero=1", "full")],
)
def test_experts_on_an_absent_hopper_are_multiplied_at_once(layout: str, remat: Any):
    """The real kernels compile, and nothing that they do is unknown."""
    model = {"n_layers": "2", "d_model": "128", "n_experts": "8", "d_expert": "64", "vocab_size": "512"}
    flags: dict[str, Any] = {"preset": "qwen3-30b-a3b", "model": model, "seq_len": 1024, "micro_batch_seqs": 2}
    flags["experts"] = "grouped"
    run = RunConfig(**flags)
    got = forecast("h100-sxm", 8, **flags, layout=layout, remat=remat)
    assert got["failed"] is None
    assert got["layout"]["experts"] == "grouped"
    assert got["experts_because"].startswith("grouped: ")
    assert "mosaic_gpu_v2" not in got["assumed"]["costed_by_bytes_alone"]
    assert "were not timed" in got["assumed"]["experts"]
    if "pipeline" not in layout:  # its idle ticks multiply too
        flops = hardware_flops_per_token(run.resolved_model, 1024, remat, "cudnn", 2, "grouped")
        assert got["hardware_flops_per_token"] == pytest.approx(flops, rel=0.02)


def test_float32_is_used_at_the_rate_at_which_it_runs():
    """TF32 on an H100: against the vector units' rate its utilisation would be above 1."""
    got = forecast("h100-sxm", 8, **GPT2, layout="fsdp=8", precision="f32")
    assert 0.05 < got["mfu"]["full"] < 1


def test_fsdp_gathers_twice_and_scatters_once():
    """ZeRO-3: every layer's matrices in bf16, once forward and once backward; its gradients once, in bf16.

    Beside the layers stands the token table: as the head it is gathered once; its two gradients, one a role, are
    scattered apart.
    """
    found = traffic_of("h100-sxm", 8, **GPT2, layout="fsdp=8")
    assert {axis for _, axis, _ in found} == {"fsdp"}
    config = RunConfig(**GPT2).resolved_model
    layers = sum(
        _elements(p.shape) for path, p in leaves(model_params(config)) if "embed" in p.dims and "layer_" in path
    )
    table, positions = config.vocab_rows * config.d_model, config.max_len * config.d_model
    total = {
        kind: sum(n * b for (k, _, b), n in found.items() if k == kind) for kind in ("all-gather", "reduce-scatter")
    }
    assert total["all-gather"] == pytest.approx(2 * (2 * layers + positions + table), rel=0.05)
    assert total["reduce-scatter"] == pytest.approx(2 * (layers + positions + 2 * table), rel=0.05)


def test_tensor_parallel_layers_scatter_and_gather_four_times():
    """Korthikanti et al. 2022, sec. 4.2.2: sums after attention and feed-forward, and at their inputs backward, are
    scattered over the sequence, and gathered again before what reads them: no device holds what another does."""
    found = traffic_of("h100-sxm", 2, **GPT2, layout="tensor=2", remat="none")
    activations = RunConfig(**GPT2).micro_batch * 512 * 768 * 2  # bf16
    of_kind = {
        kind: sum(n * b for (k, axis, b), n in found.items() if (k, axis) == (kind, "tensor") and b % activations == 0)
        for kind in ("all-reduce", "reduce-scatter", "all-gather")
    }
    assert of_kind["reduce-scatter"] / activations - 4 * 4 in (0, 1)  # four layers, and before the head
    assert of_kind["all-reduce"] / activations in (0, 1)  # the embedding's lookup
    # Inputs of weights are gathered again for their gradients, or kept.
    assert 4 * 4 <= of_kind["all-gather"] / activations <= 6 * 4 + 1


def test_data_parallel_reduces_gradients_once():
    found = traffic_of("h100-sxm", 8, **GPT2)
    assert {axis for _, axis, _ in found} == {"data"}
    sent = sum(n * b for (kind, _, b), n in found.items() if kind == "all-reduce")
    params = sum(_elements(p.shape) for _, p in leaves(model_params(RunConfig(**GPT2).resolved_model)))
    assert 2 * params < sent < 4 * params * 1.5  # bf16 or float32, the table's two roles apart


def test_does_not_fit_is_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    facts = tmp_path / "small.toml"
    facts.write_text("[devices.h100-sxm]\nhbm_bytes = 3_300_000_000\n", encoding="utf-8")
    request = verb.ForecastRequest(
        preset="gpt2-124m", devices=(8,), seq_len=512, facts=str(facts), out=str(tmp_path / "out"), json=True
    )
    assert verb.main(request) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert (record["fits"], record["failed"]) == (False, None)
    assert record["memory_bytes"]["total"] > record["memory_bytes"]["limit"]
    assert records.read(tmp_path / "out") == [record]


def test_unknown_device_is_refused_by_its_nearest():
    command = [sys.executable, "-m", "experiments.forecast", "--device=h100-sxn"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "error: no facts about device 'h100-sxn'" in done.stderr
    assert "h100-sxm" in done.stderr


def test_devices_of_others_cost_no_virtual_ones_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """40,960 virtual CPU devices are more threads than a machine has."""
    asked: list[int] = []
    monkeypatch.setattr(verb.attached, "at_least", asked.append)

    def stop(*_: object):
        raise RequestError("far enough")

    monkeypatch.setattr(verb, "devices_of", stop)
    with pytest.raises(RequestError, match="far"):
        verb.main(verb.ForecastRequest(preset="tiny", devices=(40_960,), out=str(tmp_path)))
    assert asked == []


def test_tpu(monkeypatch: pytest.MonkeyPatch):
    """Loops without a trip count, products written as convolutions, gathers spread over fusions."""
    fabrics = []
    monkeypatch.setattr(rung, "Fabric", lambda *args: fabrics.append(Fabric(*args)) or fabrics[-1])
    flags: dict[str, Any] = {"preset": "tiny", "model": {"n_layers": "2"}, "layout": "fsdp=2"}
    got = forecast("tpu-v5e", 4, **flags)
    config = RunConfig(**flags).resolved_model
    assert got["hardware_flops_per_token"] == pytest.approx(
        hardware_flops_per_token(config, 256, "full", "splash"), rel=0.02
    )
    assert sum(got["breakdown_s"].values()) == pytest.approx(got["step_s"]["median"], rel=1e-6)
    places = fabrics[0].coords
    assert places is not None
    assert {place[:2] for place in places} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    in_layers_s = got["breakdown_s"].get("exposed_fsdp", 0) + got["hidden_s"].get("fsdp", 0)
    # 14 gathers a layer, each of at least 32 kB: they take time, hidden or not
    assert in_layers_s > 14 * 2 * 32_768 / 2 / (45e9 * 2)
