"""Facts of devices: each with a source, each spelling on one device, figures as their publishers print them."""

import pickle
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path

import pytest

from experiments import hardware
from transformer.errors import RequestError

RAW = tomllib.loads(resources.files("experiments").joinpath("hardware.toml").read_text(encoding="utf-8"))
TEXTS = {"name", "platform", "compile_target", "like", "year", "spellings", "jax_kinds"}
SLUGS = {  # what the command line promises
    *("v100-sxm2", "a100-40g-sxm", "a100-80g-sxm", "h100-sxm", "h100-pcie", "h200-sxm", "b200-sxm", "b300-sxm"),
    *("gb200-nvl72", "gb300-nvl72", "mi300x", "tpu-v3", "tpu-v4", "tpu-v5e", "tpu-v5p", "tpu-v6e", "tpu-v7"),
    *("cpu-epyc-9654", "cpu-xeon-8480", "cpu"),
}
SPELLINGS = {  # every spelling of a device in the tables of published runs
    "v100-sxm2": ["V100", "V100(vTrain)", "V100-32G-SXM2", "V100-32G-SXM3 (DGX-2)", "V100-SXM2 (16/32 GB)"],
    "v100-16g-sxm2": ["V100-16G", "V100-16G-SXM2"],
    "a100-40g-sxm": ["A100-40G", "A100-40G-SXM", "A100-40G-SXM (DGX-A100)"],
    "a100-80g-sxm": ["A100", "A100 (size not stated)", "A100-80G-SXM", "A100-SXM", "A100-SXM(vTrain)"],
    "a100-80g-pcie": ["A100-80G-PCIe"],
    "h100-sxm": ["H100", "H100-SXM", "H100-80G-SXM", "H100-80G-SXM (DGX-H100)"],
    "h100-96g-sxm": ["H100-96G-HBM2e-SXM 500W (Meta Grand Teton variant, 2.4 TB/s HBM)"],
    "h100-pcie": ["H100-PCIe"],
    "h800-sxm": ["H800-80G-SXM"],
    "h200-sxm": ["H200-SXM", "H200-141G-SXM"],
    "b200-sxm": ["B200-SXM", "B200-SXM (DGX-B200)"],
    "b300-sxm": ["B300-SXM"],
    "gb200-nvl72": ["GB200", "GB200 (per GPU)"],
    "gb300-nvl72": ["GB300", "GB300 (per GPU)", "GB300 NVL72"],
    "mi300x": ["MI300X"],
    "tpu-v3": ["TPUv3", "TPU v3", "TPU v3 (per chip)"],
    "tpu-v4": ["TPUv4", "TPU v4", "TPU v4 (per chip)"],
    "tpu-v5e": ["TPUv5e", "TPU v5e (per chip)"],
    "tpu-v5p": ["TPUv5p", "TPU v5p (per chip)"],
    "tpu-v6e": ["TPU v6e (per chip)", "TPU v6e Trillium (per chip)"],
    "tpu-v7": ["TPU7x (Ironwood)", "TPU v7 Ironwood (per chip)"],
}


@pytest.fixture(scope="module")
def facts() -> hardware.Facts:
    return hardware.load()


def _raw_facts():
    """(place, fact) of every fact of the packaged file, walked without the code under test."""
    tables = {f"devices.{k}": {n: v for n, v in d.items() if n not in TEXTS} for k, d in RAW["devices"].items()}
    tables |= {f"efficiency.{k}": d for k, d in RAW["efficiency"].items()} | {
        k: RAW[k] for k in ("energy", "reliability")
    }
    for place, table in tables.items():
        for name, given in table.items():
            entries = {name: given} if "value" in given else {f"{name}.{k}": v for k, v in given.items()}
            for key, fact in entries.items():
                yield f"{place}.{key}", fact


def test_every_fact_has_a_dated_source():
    places = dict(_raw_facts())
    assert len(places) > 300
    for place, fact in places.items():
        assert fact["source"] in RAW["sources"], place
    for price in RAW["price"]:
        assert price["source"] in RAW["sources"], price
    for key, source in RAW["sources"].items():
        assert source["cite"], key
        assert source["date"], key


def test_every_source_is_used():
    used = {fact["source"] for _, fact in _raw_facts()} | {price["source"] for price in RAW["price"]}
    assert used == set(RAW["sources"])


def test_every_listed_slug_is_there(facts):
    assert set(facts.devices) >= SLUGS


@pytest.mark.parametrize(("slug", "spelling"), [(slug, s) for slug, all_of in SPELLINGS.items() for s in all_of])
def test_spelling_of_the_tables_resolves(facts, slug, spelling):
    assert facts.device(spelling).slug == slug
    assert facts.device(spelling.upper()).slug == slug


def test_spelling_is_of_one_device():
    owner: dict[str, str] = {}
    for slug, entry in RAW["devices"].items():
        for spelling in {s.casefold() for s in (slug, *entry["spellings"], *entry.get("jax_kinds", []))}:
            assert owner.setdefault(spelling, slug) == slug


def test_unknown_device_names_the_nearest(facts):
    with pytest.raises(RequestError, match=r"'h100-sxn'.*did you mean 'h100-sxm'"):
        facts.device("h100-sxn")


@pytest.mark.parametrize(
    ("kind", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g-sxm"),
        ("NVIDIA A100-SXM4-40GB", "a100-40g-sxm"),
        ("NVIDIA H200", "h200-sxm"),
        ("TPU v4", "tpu-v4"),
        ("TPU v5 lite", "tpu-v5e"),
        ("TPU v5", "tpu-v5p"),
        ("TPU v5p", "tpu-v5p"),
        ("TPU v6 lite", "tpu-v6e"),
        ("TPU7x", "tpu-v7"),
        ("cpu", "cpu"),
    ],
)
def test_jax_kind_resolves(facts, kind, slug):
    assert facts.by_jax_kind(kind).slug == slug


def test_unknown_jax_kind_is_none(facts):
    assert facts.by_jax_kind("NVIDIA GeForce RTX 4090") is None


@pytest.mark.parametrize(
    ("slug", "dtype", "tflops"),
    [  # vendors' dense figures
        ("v100-sxm2", "fp16", 125),
        ("a100-40g-sxm", "bf16", 312),
        ("a100-80g-sxm", "bf16", 312),
        ("a100-80g-sxm", "tf32", 156),
        ("h100-sxm", "bf16", 989),
        ("h100-sxm", "fp8", 1979),
        ("h100-pcie", "bf16", 756),
        ("h200-sxm", "bf16", 989),
        ("b200-sxm", "bf16", 2250),
        ("b300-sxm", "fp8", 4500),
        ("gb200-nvl72", "bf16", 2500),
        ("gb300-nvl72", "bf16", 2500),
        ("mi300x", "bf16", 1300),
        ("tpu-v3", "bf16", 123),
        ("tpu-v4", "bf16", 275),
        ("tpu-v5e", "bf16", 197),
        ("tpu-v5e", "int8", 394),
        ("tpu-v5p", "bf16", 459),
        ("tpu-v6e", "bf16", 918),
        ("tpu-v7", "bf16", 2307),
        ("tpu-v7", "fp8", 4614),
        ("cpu-epyc-9654", "f32", 96 * 2.4e9 * 32 / 1e12),
        ("cpu-xeon-8480", "bf16", 56 * 2.0e9 * 1024 / 1e12),
    ],
)
def test_peak_is_the_published_one(facts, slug, dtype, tflops):
    assert facts.device(slug).peak(dtype) == pytest.approx(tflops * 1e12, rel=1e-3)


@pytest.mark.parametrize(("slug", "dtype"), [("v100-sxm2", "bf16"), ("a100-80g-sxm", "fp8"), ("cpu", "f32")])
def test_unknown_peak_is_refused(facts, slug, dtype):
    with pytest.raises(RequestError, match=f"no {dtype} peak is known for '{slug}'"):
        facts.device(slug).peak(dtype)


@pytest.mark.parametrize(
    ("slug", "gb", "gb_per_s"),
    [("a100-80g-sxm", 80, 2039), ("h100-sxm", 80, 3350), ("h200-sxm", 141, 4800), ("tpu-v5p", 95, 2765)],
)
def test_memory_is_near_the_number_on_the_box(facts, slug, gb, gb_per_s):
    """The box says GB and means something between 10^9 and 2^30 bytes."""
    device = facts.device(slug)
    assert gb * 1e9 <= device.hbm_bytes <= gb * 1.02 * 2**30
    assert device.hbm_bytes_per_s == pytest.approx(gb_per_s * 1e9, rel=0.01)
    assert device.hbm_bytes - device.reserve_bytes == device.usable_bytes


def test_accelerators_can_be_forecast(facts):
    """What a simulated step needs is there for every accelerator."""
    for device in facts.devices.values():
        if device.platform == "cpu":
            continue
        needed = ["hbm_bytes", "reserve_bytes", "hbm_bytes_per_s", "devices_per_node", "link_latency_s"]
        needed += ["matmul_efficiency", "memory_efficiency", "link_efficiency", "attention_efficiency"]
        gpu = ["scaleup_devices", "link_bytes_per_s", "nic_bytes_per_s", "nic_latency_s", "tdp_w"]
        needed += gpu if device.platform == "gpu" else ["ici_links", "ici_bytes_per_s", "torus_dims", "pod_devices"]
        assert [name for name in needed if getattr(device, name) is None] == [], device.slug
        assert device.peak("fp16" if device.slug.startswith("v100") else "bf16") > 1e14
        assert device.compile_target in facts.devices


def test_measured_rates_stay_below_the_published(facts):
    for device in facts.devices.values():
        for dtype, rate in device.measured_matmul_flops_per_s.items():
            assert 0.4 * device.peak(dtype) < rate < device.peak(dtype), (device.slug, dtype)
        for operation, rate in device.measured_bus_bytes_per_s.items():
            # An all-reduce inside the switch moves each byte once, so that its bus bandwidth may pass the link's.
            limit = device.link_bytes_per_s * (1.1 if operation == "all_reduce" else 1)
            assert rate < limit, (device.slug, operation)


def test_small_all_gather_takes_its_measured_time(facts):
    """NCCL on 8 H100: 10.14 us for the smallest message; on 8 A100 14.58 us."""
    for slug, measured_s in (("h100-sxm", 10.14e-6), ("a100-80g-sxm", 14.58e-6)):
        device = facts.device(slug)
        assert device.collective_launch_s + 7 * device.link_latency_s == pytest.approx(measured_s, rel=0.01)


def test_virtual_cpu_devices_have_no_facts(facts):
    cpu = facts.device("cpu")
    assert (dict(cpu.peak_flops_per_s), cpu.hbm_bytes, cpu.tdp_w, cpu.system_w) == ({}, None, None, None)
    assert facts.prices("cpu") == []


def test_half_a_chip_is_a_jax_device(facts):
    chip = facts.device("tpu-v7")
    device = chip.per_jax_device()
    assert (chip.jax_devices_per_chip, device.jax_devices_per_chip) == (2, 1)
    assert device.peak("bf16") == 1153.5e12
    assert device.hbm_bytes == 96 * 2**30
    assert (device.devices_per_node, device.pod_devices) == (8, 18432)
    assert device.cited("hbm_bytes")["hbm_bytes"]["value"] == device.hbm_bytes
    assert "of a chip of 2 devices" in device.cited("hbm_bytes")["hbm_bytes"]["note"]
    assert facts.device("tpu-v5p").per_jax_device() is facts.device("tpu-v5p")


def test_cited_fact_has_value_source_and_date(facts):
    device = facts.device("h100-sxm")
    assert device.cited("hbm_bytes_per_s", "ici_links") == {
        "hbm_bytes_per_s": {
            "value": 3.35e12,
            "source": "stas00/ml-engineering 744d01e compute/accelerator/README.md",
            "date": "2026-08-22",
        }
    }
    assert device.cited("peak_flops_per_s").keys() == {f"peak_flops_per_s.{k}" for k in device.peak_flops_per_s}
    assert device.cited("peak_flops_per_s.bf16")["peak_flops_per_s.bf16"]["value"] == 989e12
    with pytest.raises(ValueError, match="hbm_bytes"):
        device.cited("hbm_byte")


def test_like_copies_what_is_published_and_not_what_was_measured(facts):
    h100, h800 = facts.device("h100-sxm"), facts.device("h800-sxm")
    assert (h800.peak("fp8"), h800.link_bytes_per_s) == (h100.peak("fp8"), 200e9)
    assert dict(h800.measured_bus_bytes_per_s) == {}
    assert facts.prices("h800-sxm") == facts.prices("h100-sxm")


def test_prices_are_per_device_hour_and_sourced(facts):
    """AWS p5.48xlarge: USD 55.04 an hour for 8 H100. GCP v5p-8: USD 16.80 for 4 chips."""
    aws = [p for p in facts.prices("h100-sxm") if p.cloud == "AWS" and p.term == "on_demand"]
    assert [p.usd_per_device_h for p in aws] == [pytest.approx(55.04 / 8)]
    assert [p.usd_per_device_h for p in facts.prices("tpu-v5p") if p.term == "on_demand"] == [pytest.approx(16.8 / 4)]
    assert facts.prices("tpu-v7") == []
    for price in facts.price_list:
        assert price.source
        assert price.date
        assert 0.1 < price.usd_per_device_h < 20


def test_electricity_is_the_average_of_2023(facts):
    assert (facts.energy.usd_per_kwh, facts.energy.pue) == (pytest.approx(0.0806, rel=0.01), 1.10)


def test_facts_can_be_sent_to_another_process(facts):
    assert pickle.loads(pickle.dumps(facts)) == facts
    assert hash(facts.device("h100-sxm")) == hash(hardware.load().device("h100-sxm"))


def test_facts_need_no_jax():
    code = "import sys, experiments.hardware, experiments.cost; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(hardware.__file__).parents[1])
