"""A user's facts file: what it changes, and that what is wrong in it is refused by name."""

import re
from pathlib import Path

import pytest

from experiments import hardware
from transformer.errors import RequestError

H100 = "[devices.h100-sxm]\n"
DOCS = Path(__file__).parents[2] / "docs" / "facts.md"


def _load(folder: Path, text: str) -> hardware.Facts:
    path = folder / "my.toml"
    path.write_text(text, encoding="utf-8")
    return hardware.load(path)


def test_documented_example_changes_what_it_says_and_nothing_else(tmp_path):
    cluster, lab = re.findall(r"```toml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S)
    facts, packaged = _load(tmp_path, cluster), hardware.load()
    mine, theirs = facts.device("H100-80G-SXM"), packaged.device("h100-sxm")
    assert (mine.nic_bytes_per_s, mine.oversubscription, mine.tdp_w) == (25e9, 2.0, 650)
    assert (theirs.nic_bytes_per_s, theirs.oversubscription, theirs.tdp_w) == (50e9, 1.0, 700)
    assert mine.peak_flops_per_s == theirs.peak_flops_per_s
    assert mine.cited("nic_bytes_per_s", "tdp_w") == {
        "nic_bytes_per_s": {"value": 25e9, "source": "purchase order 2025-118", "date": None},
        "tdp_w": {"value": 650, "source": "my.toml", "date": None},
    }
    assert (facts.energy.pue, facts.energy.usd_per_kwh, facts.energy.host_share) == (1.25, 0.11, 0.0)
    of_mine = facts.prices("h100-sxm")
    assert [p.usd_per_device_h for p in of_mine if p.term == "on_demand"] == [1.95]
    assert [p for p in of_mine if p.term == "spot"] == [p for p in packaged.prices("h100-sxm") if p.term == "spot"]
    assert facts.device("b200-sxm") == packaged.device("b200-sxm")
    assert _load(tmp_path, lab).device("h100-lab").scaleup_devices == 2


def test_new_device_is_priced_as_what_it_is_like(tmp_path):
    text = '[devices.lab]\nlike = "h100-sxm"\npeak_flops_per_s.bf16 = 900e12\nhbm_bytes_per_s = 3e12'
    facts = _load(tmp_path, text)
    lab = facts.device("LAB")
    assert (lab.name, lab.peak("bf16"), lab.peak("fp8"), lab.hbm_bytes_per_s) == ("lab", 900e12, 1979e12, 3e12)
    assert (lab.spellings, lab.jax_kinds, dict(lab.measured_matmul_flops_per_s)) == ((), (), {})
    assert facts.prices("lab") == facts.prices("h100-sxm")
    priced = _load(tmp_path, text + '\n[[price]]\ndevice = "lab"\nterm = "spot"\nusd_per_device_h = 1')
    assert [p.usd_per_device_h for p in priced.prices("lab")] == [1]


def test_new_device_from_nothing(tmp_path):
    text = '[devices.l4]\nname = "NVIDIA L4"\nplatform = "gpu"\ncompile_target = "a100-80g-sxm"\nspellings = ["L4-24G"]'
    device = _load(tmp_path, text).device("l4-24g")
    assert (device.slug, device.hbm_bytes, device.matmul_efficiency) == ("l4", None, 0.75)


def test_efficiency_can_be_set_for_a_platform_or_a_device(tmp_path):
    text = "[efficiency.gpu]\nmatmul = 0.6\n[devices.h100-sxm]\nmatmul_efficiency = 0.7"
    facts = _load(tmp_path, text)
    found = [facts.device(slug).matmul_efficiency for slug in ("a100-80g-sxm", "h100-sxm", "mi300x", "tpu-v4")]
    assert found == [0.6, 0.7, 0.48, 0.9]


def test_own_source_gives_its_date(tmp_path):
    text = (
        '[sources]\nlab = { cite = "lab book 3", date = "2026-02" }\n'
        + H100
        + 'tdp_w = { value = 600, source = "lab" }'
    )
    cited = _load(tmp_path, text).device("h100-sxm").cited("tdp_w")
    assert cited == {"tdp_w": {"value": 600, "source": "lab book 3", "date": "2026-02"}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[device.h100-sxm]\ntdp_w = 650", "unknown section 'device', did you mean 'devices'"),
        (H100 + "tpd_w = 650", "[devices.h100-sxm]: unknown key 'tpd_w', did you mean 'tdp_w'"),
        (H100 + "tdp_w = -650", "tdp_w = -650: expected a number above 0"),
        (H100 + "tdp_w = 0", "tdp_w = 0: expected a number above 0"),
        (H100 + "tdp_w = nan", "tdp_w = nan: expected a number above 0"),
        (H100 + "tdp_w = inf", "tdp_w = inf: expected a number above 0"),
        (H100 + 'tdp_w = "650 W"', "tdp_w = '650 W': expected a number"),
        (H100 + "tdp_w = true", "tdp_w = True: expected a number"),
        (H100 + "tdp_w = [650]", "tdp_w = [650]: expected a number"),
        (H100 + "tdp_w = { vaule = 650 }", "unknown key 'vaule', did you mean 'value'"),
        (H100 + "tdp_w = { source = 'x' }", "tdp_w = None: expected a number"),
        (H100 + "tdp_w = { value = 650, source = 7 }", "source = 7: expected a text"),
        (H100 + "devices_per_node = 7.5", "devices_per_node = 7.5: expected a whole number"),
        (H100 + "oversubscription = 0.5", "oversubscription = 0.5: expected at least 1"),
        (H100 + "nic_latency_s = -1e-6", "nic_latency_s = -1e-06: expected at least 0"),
        (H100 + "matmul_efficiency = 75", "matmul_efficiency = 75: expected a fraction above 0 and at most 1"),
        (H100 + "peak_flops_per_s = 989e12", "peak_flops_per_s = 989000000000000.0: expected a table"),
        (H100 + "peak_flops_per_s.bf61 = 989e12", "unknown key 'bf61', did you mean 'bf16'"),
        (H100 + "peak_flops_per_s.bf16 = -1", "peak_flops_per_s.bf16 = -1: expected a number above 0"),
        (H100 + 'spellings = "H100"', "spellings = 'H100': expected a list of texts"),
        (H100 + 'platform = "gpus"', "platform = 'gpus': did you mean 'gpu'"),
        (H100 + 'spellings = ["A100-80G"]', "spelling 'A100-80G' of device 'h100-sxm' is one of 'a100-80g-sxm'"),
        (H100 + 'like = "b200-sxm"', "'h100-sxm' is known already"),
        (H100 + 'compile_target = "h101"', "compile_target = 'h101' of device 'h100-sxm'"),
        ("[devices.h100-sxn]\ntdp_w = 650", "needs name, platform, compile_target, or like"),
        ("[devices.h100-sxn]\ntdp_w = 650", "did you mean 'h100-sxm'"),
        ('[devices.lab]\nlike = "h100sxm"', "like = 'h100sxm': no such device, did you mean 'h100-sxm'"),
        ('[devices.h100]\nlike = "h100-sxm"', "'h100'"),
        ("devices = 3", "[devices] = 3: expected a table"),
        ("[devices]\nh100-sxm = 3", "[devices.h100-sxm] = 3: expected a table"),
        ("[efficiency.gpus]\nmatmul = 0.5", "unknown key 'gpus', did you mean 'gpu'"),
        ("[efficiency.gpu]\nmatmul = 1.5", "matmul = 1.5: expected a fraction"),
        ("[energy]\npue = 0.9", "pue = 0.9: expected at least 1"),
        ("[energy]\nusd_per_kw = 0.1", "unknown key 'usd_per_kw', did you mean 'usd_per_kwh'"),
        ("price = 3", "[[price]] = 3: expected a list"),
        ('[[price]]\ndevice = "h100-sxm"', "[[price]] number 1: needs usd_per_device_h"),
        ('[[price]]\ndevice = "h100-sxm"\nusd_per_device_h = -2', "usd_per_device_h = -2: expected a number above 0"),
        ('[[price]]\ndevice = "h100-sxn"\nusd_per_device_h = 2', "did you mean 'h100-sxm'"),
        ('[[price]]\ndevice = "h100-sxm"\nusd_per_device_h = 2\nterm = "spto"', "term = 'spto': did you mean 'spot'"),
        ("[sources]\nlab = 3", "[sources] lab = 3: expected a table"),
        ("[devices.h100-sxm\n", "my.toml is not TOML"),
    ],
)  # fmt: skip
def test_wrong_file_is_refused_by_name(tmp_path, text, said):
    with pytest.raises(RequestError) as refused:
        _load(tmp_path, text)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_unreadable_file_is_refused(tmp_path, name):
    with pytest.raises(RequestError, match="cannot be read"):
        hardware.load(tmp_path / name)


def test_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "my.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match="cannot be read"):
        hardware.load(tmp_path / "my.toml")
