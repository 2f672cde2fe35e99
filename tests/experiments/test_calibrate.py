"""The whole path on a CPU: primitives measured, a facts file written, rates that give back what was measured."""

import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import calibrate, primitives, records
from experiments.forecast import hlo
from experiments.forecast.__main__ import ForecastRequest
from experiments.forecast.__main__ import main as forecast
from experiments.forecast.kernels import Product
from experiments.forecast.network import Fabric
from experiments.forecast.operations import elements
from experiments.forecast.rates import Rates
from experiments.hardware import OPERATION_CLASSES, load
from experiments.primitives import Timing
from transformer.errors import RequestError

QUICK = Timing(loop_s=0.002, loops=1)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory) -> Path:
    """Tiny sizes, eight virtual devices."""
    folder = tmp_path_factory.mktemp("calibrated")
    plan = calibrate.PLANS["cpu"]._replace(
        sides=(64, 128), heads=((8, 16, 8),), pass_bytes=(1 << 17, 1 << 18), attention=(64, 2, 16),
        message_bytes=(1 << 10, 1 << 16), soak_s=0.01,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(calibrate.PLANS, "cpu", plan)
        assert calibrate.main(calibrate.CalibrateRequest(out=str(folder), loop_s=0.002, loops=1)) == 0
    return folder / calibrate.FILE


def test_rates_give_back_what_was_measured(calibrated: Path):
    device = load(calibrated).device("cpu")
    rows = device.measured_products["f32"]
    assert len(rows) == 2**3 + 2
    assert max(2 * m * n * k * b / s for m, n, k, b, s in rows) == pytest.approx(device.peak("f32"), rel=1e-3)
    assert 1e8 < device.peak("f32") < 1e13  # FLOP/s of any CPU, however busy
    rates = Rates(device)
    fast = max(rows, key=lambda row: 2 * np.prod(row[:4]) / row[4])
    m, n, k, batch, seconds = fast
    spread = max(r[4] / np.prod(r[:4]) for r in rows) / min(r[4] / np.prod(r[:4]) for r in rows)
    assert seconds <= rates.product_s(Product(m, n, k, batch, "f32")) * 1.001 <= seconds * spread * 1.01
    assert rates.launch_s == device.launch_s > 0
    assert rates.memory_s(1e9) == pytest.approx(1e9 / device.hbm_bytes_per_s)


def test_every_class_of_operations_is_measured(calibrated: Path):
    """Between a tenth of a cycle an element and a microsecond: of any CPU, however busy."""
    device = load(calibrated).device("cpu")
    assert set(device.operation_s) == set(OPERATION_CLASSES)
    assert all(1e-12 < s < 1e-6 for s in device.operation_s.values())
    assert device.operation_s["function"] > device.operation_s["arithmetic"]
    assert 1e7 < device.fresh_bytes_per_s < 1e12
    assert len(device.measured_turned_products["f32"]) == 2**3


def test_the_timed_call_really_turns():
    """Entry and result lie by rows, so the turn cannot be left to a layout."""
    for operation in (o for of in ("crossing", "scattered", "scattered_far") for o in primitives.OPERATIONS[of]):
        arrays = [jax.ShapeDtypeStruct(operation.shape, jnp.float32)] * operation.n_arrays
        m = hlo.parse(jax.jit(operation.work).lower(*arrays).compile().as_text())
        main = m.computations[m.entry]
        counted = sum((elements(m.computations, main, line) for line in main.instructions), Counter())
        of = next(name for name, kinds in primitives.OPERATIONS.items() if operation in kinds)
        assert counted[of] == operation.n_arrays * np.prod(operation.shape), operation


def test_a_turned_product_is_timed_as_it_lies(monkeypatch):
    seen = []
    monkeypatch.setattr(primitives, "seconds_per_round", lambda work, c, timing: seen.append((work, c)) or 1.0)
    primitives.product_s(3, 5, 7, 1, jnp.float32, QUICK, turned=True)
    ((work, arrays),) = seen
    assert [a.shape for a in arrays] == [(7, 3), (5, 7)]
    assert "contracting_dims = [0] x [1]" in jax.jit(work).lower(arrays).as_text()


def test_a_forecast_rests_on_the_calibration(calibrated: Path, tmp_path):
    request = ForecastRequest(
        preset="tiny", model={"n_layers": "1"}, device="cpu", devices=(1,), facts=str(calibrated), out=str(tmp_path)
    )
    assert forecast(request) == 0
    (record,) = records.read(tmp_path)
    device = load(calibrated).device("cpu")
    assert record["facts"]["hbm_bytes_per_s"]["source"].startswith("experiments.calibrate on")
    assert record["kind"] == "forecast"
    assert record["fits"] is None
    assert record["step_s"]["median"] > record["breakdown_s"]["matmul"] > 0
    assert record["hfu"] < 1
    assert record["tokens_per_s"] * record["hardware_flops_per_token"] < device.peak("f32")


def test_collectives_of_virtual_devices_are_measured(calibrated: Path):
    device = load(calibrated).device("cpu")
    measured_s = device.collective_launch_s + (8 - 1) * device.link_latency_s
    assert measured_s > 0
    assert Fabric(device).collective_s("all-gather", 1e6, range(8)) >= 7 / 8 * 1e6 / device.link_bytes_per_s


def test_every_fact_says_where_it_is_from(calibrated: Path):
    device = load(calibrated).device("cpu")
    for name in ("launch_s", "hbm_bytes_per_s", "attention_efficiency", "measured_products.f32"):
        fact = device.sources[name]
        assert fact.source.startswith("experiments.calibrate on 8 x cpu, JAX ")
        assert fact.date == calibrated.read_text().split('date = "')[1][:10]


@pytest.mark.parametrize("kind", ["all-reduce", "all-gather", "reduce-scatter", "all-to-all"])
def test_the_loop_really_holds_the_collective(kind: str, monkeypatch):
    seen = []

    def look(work, x, timing):
        seen.append(jax.jit(work).lower(x).as_text())
        assert jax.eval_shape(work, x).shape == x.shape  # so it can be repeated
        return 1.0

    monkeypatch.setattr(primitives, "seconds_per_round", look)
    primitives.collective_s(kind, 1 << 12, jax.devices()[:4], QUICK)
    assert f"stablehlo.{kind.replace('-', '_')}" in seen[0]


def test_rounds_are_neither_dropped_nor_merged():
    """Twice the work, about twice the time: generous, for the machine is shared."""
    short, long = (
        min(primitives.product_s(64, 64, k, 1, jnp.float32, Timing(0.01, 3, time.process_time)) for _ in range(3))
        for k in (512, 8192)
    )
    assert 4 < long / short < 64


def test_watts_need_a_gpu():
    assert primitives.watts(0.01, lambda: None) is None


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"largest": 3}, "--largest=3: expected 64 or more, or 0"),
        ({"loop_s": 0.0}, "--loop_s=0.0: expected seconds above 0"),
        ({"loops": 0}, "--loops=0: expected at least 1"),
    ],
)
def test_a_bad_request_is_refused(wrong, line):
    with pytest.raises(RequestError, match=line):
        calibrate.CalibrateRequest(**wrong)
