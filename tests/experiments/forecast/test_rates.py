"""Seconds of products, attention, memory and launches: by hand, against measured rows that the fit never saw, and
properties that no device can break."""

import csv
import dataclasses
import time
from importlib import resources

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.forecast import constants, products
from experiments.forecast.kernels import Product
from experiments.forecast.rates import LAUNCH_S, Rates
from experiments.hardware import Device, load
from transformer.errors import RequestError

FACTS = load()
PLAIN = Device(
    slug="round", name="Round numbers", platform="gpu", compile_target="round",
    peak_flops_per_s={"bf16": 1e12}, hbm_bytes_per_s=1e9, matmul_efficiency=0.5, memory_efficiency=0.5,
    attention_efficiency=0.25,
)  # fmt: skip
TILED = dataclasses.replace(PLAIN, peak_flops_per_s={"bf16": 2e12}, sm_count=4, hbm_bytes_per_s=1e15)


def rates(slug: str, **changes) -> Rates:
    return Rates(FACTS.device(slug), **changes)


@pytest.mark.smoke
def test_without_processors_to_count_a_product_is_its_flops():
    assert Rates(PLAIN).product_s(Product(10, 20, 30, batch=5)) == pytest.approx(2 * 10 * 20 * 30 * 5 / 0.5e12)


@pytest.mark.parametrize(("m", "waves"), [(1, 1), (64, 1), (65, 2), (1024, 16), (1025, 17)])
def test_tiles_come_in_waves(m: int, waves: int):
    """[m, 256] is at its finest cut into rows of four tiles of 64 x 64, one for each of four processors of 0.25e12
    FLOP/s: a row that is begun costs as much as a full one."""
    tile_s = 2 * 64 * 64 * (4096 + constants.TILE_FILL_K.value) / 0.25e12
    got = Rates(TILED).product_s(Product(m, 256, 4096)) - constants.PRODUCT_START_S.value
    assert got == pytest.approx(waves * tile_s)


def test_batched_products_share_the_waves():
    single, batched = (Rates(TILED).product_s(Product(128, 128, 4096, batch=b)) for b in (1, 4))
    start = constants.PRODUCT_START_S.value
    assert batched - start == pytest.approx(4 * (single - start), rel=0.05)  # one alone splits into the 4 processors


@pytest.mark.parametrize(
    ("slug", "dtype", "median", "p90"),
    [
        ("a100-80g-sxm", "bf16", 0.03, 0.12), ("h100-sxm", "bf16", 0.04, 0.12), ("h100-sxm", "fp8", 0.03, 0.10),
        ("h200-sxm", "bf16", 0.08, 0.18), ("b200-sxm", "bf16", 0.04, 0.12), ("gb300-nvl72", "fp8", 0.03, 0.10),
    ],
)  # fmt: skip
def test_products_that_were_left_out_are_found_again(slug: str, dtype: str, median: float, p90: float):
    """A tenth of the rows is left out. (H200's rows scatter by 6 % among neighbours.)"""
    device, peak = FACTS.device(slug), FACTS.device(slug).peak(dtype)
    rows = np.array(products.published()[slug, dtype])
    held = np.random.default_rng(0).random(len(rows)) < 0.1
    found = products.fit(device, dtype, peak, rows[~held].tolist())
    shapes = products.Shapes(*rows[held].T[:4])
    error = np.abs(found.seconds(device, shapes, dtype, peak) / rows[held].T[4] - 1)
    assert np.median(error) < median
    assert np.percentile(error, 90) < p90


def test_a_part_that_was_not_measured_is_like_its_sister():
    """A100 40 GB: the 80 GB part's products. H100 PCIe: fewer processors at fewer watts."""
    product = Product(8192, 8192, 8192)
    assert rates("a100-40g-sxm").product_s(product) == pytest.approx(rates("a100-80g-sxm").product_s(product), rel=0.03)
    ratio = rates("h100-pcie").product_s(product) / rates("h100-sxm").product_s(product)
    assert 989 / 756 * 0.9 < ratio < 1.5
    custom = dataclasses.replace(FACTS.device("h100-sxm"), slug="h100-lab", like="h100-sxm")
    assert Rates(custom).product_s(product) == rates("h100-sxm").product_s(product)


@pytest.mark.parametrize("slug", ["h200-sxm", "gb200-nvl72"])
def test_sustained_rate_is_that_of_boards_at_their_limit(slug: str):
    """Another benchmark of the same parts kept them at 95 % of their watts and more."""
    text = resources.files("experiments").joinpath("published/products_power.csv").read_text()
    rows = [r for r in csv.DictReader(line for line in text.splitlines() if line[0] != "#") if r["device"] == slug]
    at_limit = [float(r["tflops"]) for r in rows if float(r["power_w"]) > 0.95 * float(r["power_limit_w"])]
    device = FACTS.device(slug)
    most = products.sustained_flops_per_s(device, "bf16", device.peak("bf16"))
    assert most == pytest.approx(np.median(at_limit) * 1e12, rel=0.08)


def test_what_facts_say_of_a_sustained_rate_goes_before_short_loops():
    """B200: 50 products of 1e13 FLOP and more in training's layouts reach 990 to 1,151 TFLOP/s; one product in a short
    loop reached 1,388. Others of the part have its rate by their watts."""
    product = Product(4096, 128256, 16384)  # printed as 0.490 to 0.511 of 2,250 TFLOP/s, by layout
    alone, amid = (product.flops / rates("b200-sxm", sustained=s).product_s(product) for s in (False, True))
    assert alone > 1300e12
    assert 990e12 < amid < 1151e12
    lab = {"slug": "b200-lab", "like": "b200-sxm", "tdp_w": 500}
    capped = dataclasses.replace(FACTS.device("b200-sxm"), **lab, sustained_flops_per_s=None)
    assert product.flops / Rates(capped).product_s(product) == pytest.approx(amid * 0.5**0.5)
    told = dataclasses.replace(capped, sustained_flops_per_s=600e12)
    assert product.flops / Rates(told).product_s(product) == pytest.approx(600e12)


def test_in_training_no_product_is_faster_than_watts_allow():
    product = Product(4096, 4096, 16384)  # the fastest of H100's rows: 817 TFLOP/s
    alone, amid = (product.flops / rates("h100-sxm", sustained=s).product_s(product) for s in (False, True))
    assert alone > 740e12
    assert 660e12 < amid < 710e12
    capped = dataclasses.replace(FACTS.device("h100-sxm"), tdp_w=350)
    assert product.flops / Rates(capped).product_s(product) == pytest.approx(amid * 0.5**0.5)


def test_tpu_pads_to_its_lanes():
    tpu = rates("tpu-v5p")
    assert tpu.product_s(Product(8, 100, 64)) == tpu.product_s(Product(8, 128, 128))
    assert tpu.product_s(Product(1024, 1024, 1024)) == pytest.approx(2 * 1024**3 / (459e12 * 0.9))


@pytest.mark.parametrize(
    ("slug", "head", "backward", "tflops"),
    [
        ("a100-80g-sxm", 128, False, 227), ("a100-80g-sxm", 128, True, 196),  # FlashAttention-2: 73 and 63 % of peak
        ("h100-sxm", 64, False, 497), ("h100-sxm", 128, False, 648), ("h100-sxm", 256, False, 746),  # FlashAttention-3
        ("h100-sxm", 128, True, 561),
    ],
)  # fmt: skip
def test_attention_as_published(slug: str, head: int, backward: bool, tflops: float):
    got = 1e12 / rates(slug).attention_s(1e12, head=head, backward=backward) / 1e12
    assert got == pytest.approx(tflops, rel=0.07)


def test_attention_of_short_sequences_wastes_the_diagonal():
    h100 = rates("h100-sxm")
    long = h100.attention_s(1e12)
    assert h100.attention_s(1e12, length=1024, causal=True) == pytest.approx(long * (1024 + 128) / 1024)
    assert h100.attention_s(1e12, length=192, causal=False) == pytest.approx(long * 256 / 192)
    both = 2 / 7 * h100.attention_s(1e12, backward=False) + 5 / 7 * h100.attention_s(1e12, backward=True)
    assert long == pytest.approx(both)


def test_attention_without_facts_of_processors_is_a_fraction_of_peak():
    assert Rates(PLAIN).attention_s(1e12) == pytest.approx(1 / 0.25)


def test_what_fits_into_l2_need_not_come_from_memory():
    h100 = rates("h100-sxm")
    near = 24 * 132 * 1.98e9
    assert h100.memory_s(1e6) == pytest.approx(1e6 / near)
    assert h100.memory_s(1e9) == pytest.approx(1e9 / (3.35e12 * 0.85))
    assert h100.memory_s(52_428_800) == pytest.approx(52_428_800 / (3.35e12 * 0.85))
    assert Rates(PLAIN).memory_s(100) == pytest.approx(100 / 0.5e9)


def test_operations_are_done_one_after_the_other():
    """A class that was not measured costs nothing: memory limits it."""
    core = Rates(dataclasses.replace(PLAIN, operation_s={"function": 3e-10, "arithmetic": 1e-11}))
    assert core.operations_s({"function": 1000, "arithmetic": 5000, "scattered": 7}) == pytest.approx(3e-7 + 5e-8)
    assert rates("h100-sxm").operations_s({"function": 1e9}) == 0


def test_memory_is_given_anew_where_it_is_not_kept():
    core = Rates(dataclasses.replace(PLAIN, fresh_bytes_per_s=2e9))
    assert core.fresh_s(2**25) == 0
    assert core.fresh_s(2**25 + 1) == pytest.approx(2**25 / 2e9)
    assert rates("h100-sxm").fresh_s(1e12) == 0


def test_turned_products_have_rows_of_their_own():
    straight = [[m, n, k, 1, 2 * m * n * k / 0.4e12] for m in (64, 256) for n in (64, 256) for k in (64, 256)]
    turned = [[*row[:4], 4 * row[4]] for row in straight]
    known = {"peak_flops_per_s": {"f32": 1e12}, "measured_products": {"f32": straight}, "platform": "cpu"}
    core = dataclasses.replace(PLAIN, **known, measured_turned_products={"f32": turned})
    plain, across = Product(128, 128, 128, 1, "f32"), Product(128, 128, 128, 1, "f32", turned=True)
    assert Rates(core).product_s(across) == pytest.approx(4 * Rates(core).product_s(plain))
    never = Rates(dataclasses.replace(core, measured_turned_products={}, slug="never"))
    assert never.product_s(across) == never.product_s(plain)


def test_launches():
    assert rates("h100-sxm").launch_s == LAUNCH_S["gpu"]
    assert Rates(dataclasses.replace(PLAIN, launch_s=7e-6)).launch_s == 7e-6
    assert 1000 * rates("h100-sxm").launch_s == pytest.approx(3e-3)
    assert 1000 * constants.EAGER_LAUNCH_S.value == pytest.approx(9.6e-3)


def test_cycles_of_a_tpu():
    """MaxText's 32B on 256 v5e chips: 14.7 s at 1.5 GHz by the compiler's cycles, 12.5 s published."""
    assert rates("tpu-v5e").cycles_s(14.7 * 1.5e9) == pytest.approx(12.5, rel=0.01)


def test_an_unknown_rate_is_named():
    with pytest.raises(RequestError, match="round has no peak rate for f64: known are bf16"):
        Rates(PLAIN).product_s(Product(1, 1, 1, dtype="f64"))


def test_every_constant_says_what_it_is():
    found = constants.all_of_them()
    assert len(found) > 15
    for name, constant in found.items():
        assert constant.unit, name
        assert len(constant.meaning) > 20, name
        assert constant.evidence, name
    slugs = {slug.partition("-")[0] for slug in FACTS.devices if "-" in slug} - {"tpu", "cpu"} | {"megatron", "vtrain"}
    assert not any(slug in name.lower() for name in found for slug in slugs)


def test_thousands_a_second():
    """For search without a schedule. Generous: this machine is shared."""
    h100 = rates("h100-sxm")
    h100.product_s(Product(1, 1, 1))
    started = time.process_time()
    h100.products_s(np.arange(1, 20_001), 4096, 4096)
    for _ in range(10_000):
        h100.product_s(Product(4096, 4096, 4096))
    assert time.process_time() - started < 5


SLUGS = st.sampled_from(["v100-sxm2", "a100-40g-sxm", "h100-sxm", "b300-sxm", "mi300x", "tpu-v5p"])
SIZES = st.integers(1, 1 << 15)


@settings(deadline=None)
@given(SLUGS, SIZES, SIZES, SIZES)
def test_no_product_is_faster_than_the_peak(slug: str, m: int, n: int, k: int):
    device = rates(slug, sustained=False)
    assert device.product_s(Product(m, n, k)) >= 2 * m * n * k / device.peak("bf16")


@settings(deadline=None)
@given(SLUGS, SIZES, SIZES, SIZES, st.integers(1, 64))
def test_one_and_many_are_the_same(slug: str, m: int, n: int, k: int, batch: int):
    device = rates(slug)
    many = device.products_s(np.array([m, 7]), np.array([n, 7]), np.array([k, 7]), np.array([batch, 1]))
    assert many[0] == pytest.approx(device.product_s(Product(m, n, k, batch)), rel=1e-12)


@settings(deadline=None)
@given(st.sampled_from(["v100-sxm2", "mi300x", "tpu-v5p"]), SIZES, SIZES, SIZES, st.sampled_from([2, 4]))
def test_a_larger_product_is_never_faster(slug: str, m: int, n: int, k: int, factor: int):
    device = rates(slug)
    assert device.product_s(Product(m * factor, n, k)) >= device.product_s(Product(m, n, k)) * (1 - 1e-12)
    assert device.product_s(Product(m, n, k * factor)) >= device.product_s(Product(m, n, k)) * (1 - 1e-12)


@given(SLUGS, st.floats(0, 1e10), st.floats(0, 1e10))
def test_more_bytes_are_never_faster(slug: str, one: float, other: float):
    low, high = sorted((one, other))
    assert rates(slug).memory_s(low) <= rates(slug).memory_s(high) * (1 + 1e-12)
