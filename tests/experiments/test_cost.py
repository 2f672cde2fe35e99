"""Rent and electricity, against sums that others have published or that fit on a napkin."""

import json
import subprocess
import sys

import pytest

from experiments import cost, entry, hardware, records
from transformer.errors import RequestError

PACKAGED = hardware.load()


def record(*, device: str, n_devices: int, tokens_per_s: float | None = 1e6, **changed) -> records.Record:
    """A record with what `cost` reads and what the schema asks for."""
    made = {"schema": 1, "kind": "measured", "preset": "tiny", "model": {}, "device": device, "n_devices": n_devices}
    made |= {"layout": {"data": n_devices, "tensor": 1, "remat": "full"}, "scaling": "weak", "seq_len": 2048}
    made |= {"step_s": {"median": 2.0, "low": 1.9, "high": 2.2}, "tokens_per_s": tokens_per_s, "fits": True}
    return made | {"failed": None} | changed


def facts_of(folder, text: str) -> hardware.Facts:
    path = folder / "my.toml"
    path.write_text(text, encoding="utf-8")
    return hardware.load(path)


def test_rent_by_hand():
    """8 devices at USD 2.50 and 1,000,000 tokens/s: USD 20 an hour for 3.6e9 tokens; 300e9 tokens take 83.3 h."""
    (row,) = cost.rows([record(device="h100-sxm", n_devices=8)], PACKAGED, tokens=300e9, usd_per_device_h=2.5)
    assert row["usd_per_device_h"] == {"low": 2.5, "median": 2.5, "high": 2.5}
    assert row["usd_per_h"] == 20
    assert row["usd_per_mtok"] == pytest.approx(20 / 3600)
    assert row["run_days"] == pytest.approx(300e9 / 1e6 / 86400)
    assert row["run_usd"]["median"] == pytest.approx(20 * 300e9 / 1e6 / 3600)
    assert (row["layout"], row["step_s"], row["why_not"]) == ("data=8", 2.0, None)
    assert row["price_sources"] == ["--usd_per_device_h"]


@pytest.mark.parametrize(
    ("device", "kwh", "low_usd", "high_usd"), [("a100-80g-sxm", 292, 20.4, 35.0), ("h100-sxm", 511, 36, 61)]
)
def test_electricity_of_a_board_for_a_month(tmp_path, device, kwh, low_usd, high_usd):
    """A board at its limit for 730 h, without cooling, at 7 and at 12 cents."""
    board = facts_of(tmp_path, "[energy]\npue = 1.0")
    for cents, usd in ((7, low_usd), (12, high_usd)):
        (row,) = cost.rows([record(device=device, n_devices=1)], board, usd_per_kwh=cents / 100)
        assert row["energy_usd_per_device_month"] == pytest.approx(usd, rel=0.01)
        assert row["energy_usd_per_device_month"] / (cents / 100) == pytest.approx(kwh)
    assert "upper bound" in row["watts_basis"]


def test_energy_of_gpt3():
    """Patterson et al. 2021, Table 4: 10,000 V100 x 14.8 days x 330 W x PUE 1.10 = 1,287 MWh."""
    tokens_per_s = 300e9 / (14.8 * 86400)
    found = record(device="V100", n_devices=10_000, tokens_per_s=tokens_per_s)
    (row,) = cost.rows([found], PACKAGED, tokens=300e9, usd_per_kwh=0.08)
    assert row["run_days"] == pytest.approx(14.8)
    assert row["run_kwh"] == pytest.approx(1_287_000, rel=0.003)
    assert row["run_energy_usd"] == pytest.approx(row["run_kwh"] * 0.08)
    assert row["kwh_per_mtok"] == pytest.approx(row["run_kwh"] / 300e3)
    assert "330 W (measured" in row["watts_basis"]


def test_energy_of_palm(tmp_path):
    """PaLM 540B: 8,404,992 chip-hours (full_runs of its paper) at 378.5 W x PUE 1.08 are 3.4 GWh."""
    facts = facts_of(tmp_path, "[energy]\npue = 1.08")
    hours = 8_404_992 / 6144
    found = record(device="TPU v4", n_devices=6144, tokens_per_s=780e9 / (hours * 3600))
    (row,) = cost.rows([found], facts, tokens=780e9)
    assert row["run_kwh"] == pytest.approx(3.436e6, rel=0.001)


def test_rent_of_llama2_70b():
    """Touvron et al. 2023, Table 2: 1,720,320 A100-80G hours for 2e12 tokens."""
    found = record(device="A100-80G-SXM", n_devices=2048, tokens_per_s=2e12 / (1_720_320 * 3600 / 2048))
    (row,) = cost.rows([found], PACKAGED, tokens=2e12)
    assert row["run_usd"]["low"] == pytest.approx(1_720_320 * 1.29)
    assert row["run_usd"]["high"] == pytest.approx(1_720_320 * 5.524)
    assert row["run_usd"]["low"] < row["run_usd"]["median"] < row["run_usd"]["high"]
    assert row["run_usd"]["median"] == pytest.approx(row["usd_per_mtok"] * 2e6)


def test_terms_are_not_mixed():
    found = [record(device="h100-sxm", n_devices=1)]
    (on_demand,), (spot,) = cost.rows(found, PACKAGED, term="on_demand"), cost.rows(found, PACKAGED, term="spot")
    assert on_demand["usd_per_device_h"] == {"low": 2.29, "median": pytest.approx(5.435), "high": 11.53}
    assert (spot["usd_per_device_h"]["low"], spot["usd_per_device_h"]["high"]) == (0.8015, 3.354)
    assert any("SkyPilot catalog v8" in source for source in spot["price_sources"])


def test_half_a_chip_costs_half(tmp_path):
    """JAX makes two devices of a TPU v3 chip: USD 2.00 an hour and 283 W measured are those of the chip."""
    (row,) = cost.rows([record(device="tpu-v3", n_devices=2)], PACKAGED)
    assert row["usd_per_h"] == 2.0
    assert row["watts_per_device"] == pytest.approx(283 / 2 * 1.10)
    assert "283 of a chip of 2 devices" in row["watts_basis"]


def test_host_share_is_added_to_the_board_only(tmp_path):
    facts = facts_of(tmp_path, "[energy]\nhost_share = 0.5\npue = 1.2")
    boards = cost.rows([record(device=d, n_devices=1) for d in ("h100-sxm", "v100-sxm2")], facts)
    assert [row["watts_per_device"] for row in boards] == [pytest.approx(700 * 1.5 * 1.2), pytest.approx(330 * 1.2)]


def test_without_tokens_there_is_no_run():
    (row,) = cost.rows([record(device="h100-sxm", n_devices=1)], PACKAGED)
    assert not [key for key in row if key.startswith("run_")]


def test_what_is_not_known_says_why():
    found = [
        record(device="cpu", n_devices=8),
        record(device="tpu-v7", n_devices=2),
        record(device="h100-sxm", n_devices=8, step_s=None, tokens_per_s=None, failed="out of memory"),
        record(device="h100-sxm", n_devices=8, fits=False),
    ]
    cpu, v7, failed, too_large = cost.rows(found, PACKAGED, tokens=1e9)
    nothing = ("usd_per_device_h", "usd_per_h", "usd_per_mtok", "run_usd", "watts_per_device", "watts_basis", "run_kwh")
    for row in (cpu, v7):
        assert [row[key] for key in nothing] == [None] * len(nothing)
        assert row["run_days"] == pytest.approx(1e9 / 1e6 / 86400)
        assert f"no on_demand price of {row['device']} is known: give --usd_per_device_h" in row["why_not"]
        assert f"no watts are known for {row['device']}" in row["why_not"]
    assert (failed["usd_per_mtok"], failed["run_usd"], failed["run_days"], failed["step_s"]) == (None,) * 4
    assert failed["usd_per_h"] > 0
    assert failed["why_not"] == "failed: out of memory"
    assert (too_large["fits"], too_large["why_not"]) == (False, "does not fit in memory")
    assert too_large["usd_per_mtok"] > 0


@pytest.mark.parametrize("name", ["tokens", "usd_per_device_h", "usd_per_kwh"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_number_that_is_not_above_zero_is_refused(name, value):
    with pytest.raises(RequestError, match=f"--{name}="):
        cost.rows([record(device="h100-sxm", n_devices=1)], PACKAGED, **{name: value})


def test_device_without_facts_is_refused():
    with pytest.raises(RequestError, match=r"no facts about device 'h100-sxn'.*'h100-sxm'"):
        cost.rows([record(device="h100-sxn", n_devices=1)], PACKAGED)


def test_request_from_argv():
    argv = ["runs", "--tokens=300e9", "--term=spot", "--usd_per_device_h=2.5", "--usd_per_kwh=0.1", "--facts=my.toml"]
    request = entry.parse(cost.Request, argv)
    assert request == cost.Request(
        folder="runs", tokens=300e9, term="spot", usd_per_device_h=2.5, usd_per_kwh=0.1, facts="my.toml"
    )
    with pytest.raises(RequestError, match="term"):
        entry.parse(cost.Request, ["runs", "--term=monthly"])


def test_measured_and_forecast_are_two_tables(tmp_path, capsys):
    records.append(tmp_path, record(device="h100-sxm", n_devices=8))
    records.append(tmp_path, record(device="h100-sxm", n_devices=1024, kind="forecast"))
    cost.main(cost.Request(folder=str(tmp_path), tokens=300e9))
    measured, _, forecast = capsys.readouterr().out.partition("forecast:")
    assert "measured:" in measured
    assert "1,024" not in measured
    assert "1,024" in forecast
    for title in ("step [s]", "USD/device/h", "USD/Mtok", "run [days]", "run [USD]", "kWh/Mtok"):
        assert title in measured
        assert title in forecast
    assert "SkyPilot catalog v8" in forecast


def test_command_line_prints_rows_and_refuses_nonsense(tmp_path):
    records.append(tmp_path, record(device="h100-sxm", n_devices=8))

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "experiments.cost", str(tmp_path), *flags]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run("--json", "--tokens=300e9", "--usd_per_device_h=2.5")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert (row["kind"], row["usd_per_h"]) == ("measured", 20.0)
    for wrong in ("--tokens=0", "--tokens=-1", "--usd_per_device_h=0", "--facts=missing.toml"):
        refused = run(wrong)
        assert (refused.returncode, refused.stdout) == (2, ""), wrong
        assert wrong.partition("=")[0] in refused.stderr
        assert refused.stderr.count("\n") == 1
