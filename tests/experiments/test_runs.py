"""From a record to its whole run: rates, checkpoints, prices, tables."""

import json
import re
import subprocess
import sys

import pytest

from experiments import cost, entry, goodput, hardware, records, runs
from transformer.errors import RequestError

PACKAGED = hardware.load()
ASKED = runs.Asked(runs=20)


def record(n_devices: int = 16_384, *, device: str = "h100-sxm", **changed) -> records.Record:
    """Llama 3 405B as forecast: data x fsdp 128 x tensor 8, its state over 1,024 devices."""
    layout = {"data": max(1, n_devices // 1024), "fsdp": 128, "tensor": 8, "zero": 3, "remat": "full"}
    made = {"schema": 1, "kind": "forecast", "preset": "llama3-405b", "model": {}, "device": device}
    made |= {"n_devices": n_devices, "layout": layout, "scaling": "weak", "seq_len": 8192}
    made |= {"step_s": {"median": 6.0, "low": 6.0, "high": 6.0}, "tokens_per_s": 2.7e6 * n_devices / 16_384}
    memory = {"params": 4 * 405e9 / 1024, "optimizer": 8 * 405e9 / 1024, "total": 70e9, "limit": 80e9}
    return made | {"memory_bytes": memory, "fits": True, "failed": None} | changed


def priced(found: records.Record, facts: hardware.Facts = PACKAGED, asked: runs.Asked = ASKED, **given) -> dict:
    (row,) = cost.rows([found], facts, tokens=15.6e12, asked=asked, **given)
    return row


@pytest.mark.parametrize("n_devices", [1024, 16_384, 40_960])
def test_checkpoint_holds_the_state_once(n_devices):
    """12 bytes a parameter, however many replicas there are."""
    assert runs.checkpoint_bytes(record(n_devices)) == pytest.approx(12 * 405e9)


def test_bloom_checkpoint():
    """2.3 TB in 40 s from 48 nodes (its chronicles, 2022-03-21), with bf16 weights beside the 12 bytes."""
    layout = {"data": 8, "pipeline": 12, "tensor": 4}
    memory = {"optimizer": 8 * 176.2e9 / 48}
    found = priced(record(384, device="a100-80g-sxm", layout=layout, memory_bytes=memory))
    assert found["run_checkpoint_bytes"] * 14 / 12 == pytest.approx(2.3e12, rel=0.08)
    assert found["run_checkpoint_s"] * 14 / 12 == pytest.approx(40, rel=0.1)


def test_rent_by_hand():
    """Wall hours times all devices and the spares' at USD 2; energy for as long at full watts."""
    row = priced(record(), usd_per_device_h=2.0)
    hours = row["run_days"] * 24 / row["run_goodput"]
    assert row["run_days_with_failures"] * 24 == pytest.approx(hours)
    assert row["run_spare_devices"] == 8 * row["run_spare_nodes"] > 0
    assert row["run_usd_with_failures"]["median"] == pytest.approx(2 * hours * (16_384 + row["run_spare_devices"]))
    assert row["run_kwh_with_failures"] == pytest.approx(row["run_kwh"] / row["run_goodput"])
    assert row["run_failures"] == pytest.approx(16_384 * 5.267e-4 * hours / 24, rel=1e-3)
    assert sum(row["run_shares"].values()) == pytest.approx(1)
    simulated = row["run_days_simulated"]
    assert simulated["low"] < simulated["mean"] < simulated["high"]
    assert simulated["mean"] == pytest.approx(row["run_days_with_failures"], rel=0.01)


def test_more_devices_lose_more():
    found = [priced(record(n)) for n in (1024, 4096, 16_384, 40_960)]
    kept = [row["run_goodput"] for row in found]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > 0.97
    assert 0.7 < kept[-1] < 0.85
    assert [row["run_usd_with_failures"]["median"] > row["run_usd"]["median"] for row in found] == [True] * 4


def test_half_a_chip_fails_half_as_often():
    """JAX makes two devices of a TPU v3 chip; 2e-4 a day is a chip's."""
    rows = [priced(record(1024, device=device)) for device in ("tpu-v3", "tpu-v4")]
    often = [row["run_failures"] / row["run_days_with_failures"] for row in rows]
    assert often == pytest.approx([1024 * 1e-4, 1024 * 2e-4], rel=0.01)


def test_flags_go_over_the_facts():
    asked = runs.Asked(
        failures_per_device_day=1e-3, restart_s=60.0, checkpoint_bytes_per_s=2e12, spare_nodes=40, runs=0
    )
    row = priced(record(), asked=asked)
    assert row["run_failures"] / row["run_days_with_failures"] == pytest.approx(16.384, rel=1e-3)
    assert row["run_checkpoint_s"] == pytest.approx(405e9 * 12 / 2e12)
    assert row["run_spare_nodes"] == 40
    assert (row["run_goodput_simulated"], row["run_days_simulated"]) == (None, None)
    rests = {fact["name"]: fact["source"] for fact in row["run_rests_on"]}
    assert rests["restart_s"] == "--restart_s"
    assert rests["storage_bytes_per_s"] == "--checkpoint_bytes_per_s"
    assert "Schroeder" in rests["repair_s"]
    waits = priced(
        record(), asked=runs.Asked(checkpoint="sync", checkpoint_s=300.0, checkpoint_interval_s=3600, runs=0)
    )
    assert (waits["run_checkpoint_s"], waits["run_interval_s"]) == (300.0, 3600.0)
    ratio = waits["run_shares"]["checkpoints"] / (waits["run_goodput"] + waits["run_shares"]["slow_nodes"])
    assert ratio == pytest.approx(1 / 12)


def test_facts_file_goes_over_the_packaged_facts(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text("[reliability]\nfailures_per_device_day.gpu = 1e-4\nslow_nodes_per_node_day = 0\nrepair_s = 7200\n")
    row = priced(record(), hardware.load(path))
    assert row["run_failures"] / row["run_days_with_failures"] == pytest.approx(1.6384, rel=1e-3)
    assert row["run_shares"]["slow_nodes"] == 0
    assert {"name": "repair_s", "value": 7200, "source": "my.toml"} in row["run_rests_on"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("restart_s = -1", "restart_s = -1: expected a number above 0"),
        ("node_loss_share = 1.5", "node_loss_share = 1.5: expected a fraction above 0 and at most 1"),
        ("repair_h = 3", "unknown key 'repair_h', did you mean 'repair_s'"),
        ("failures_per_device_day.gpus = 1e-4", "unknown key 'gpus', did you mean 'gpu'"),
        ("slow_step_share = -0.1", "slow_step_share = -0.1: expected at least 0"),
    ],
)
def test_wrong_fact_is_refused(tmp_path, text, said):
    path = tmp_path / "my.toml"
    path.write_text(f"[reliability]\n{text}\n")
    with pytest.raises(RequestError, match=re.escape(said)):
        hardware.load(path)


def test_what_is_not_known_says_why():
    cpu = priced(record(8, device="cpu"))
    assert cpu["run_why_not"] == "no failure rate of cpu is known: give --failures_per_device_day"
    assert cpu["run_days"] > 0
    bare = priced(record(memory_bytes=None))
    assert bare["run_why_not"] == "the record has no bytes of the optimizer: give --checkpoint_s"
    assert priced(record(memory_bytes=None), asked=runs.Asked(checkpoint_s=10, runs=0))["run_goodput"] > 0.9
    failed = priced(record(failed="out of memory", tokens_per_s=None, step_s=None))
    assert failed["run_why_not"] == "failed: out of memory"
    stuck = priced(record(), asked=runs.Asked(restart_s=1e5))
    assert stuck["run_why_not"].startswith("does not get on: a failure every 10,0")
    assert "run_goodput" not in stuck
    for asked in (runs.Asked(failures_per_device_day=1e9), runs.Asked(checkpoint_interval_s=1e12)):
        assert priced(record(), asked=asked)["run_why_not"].startswith("does not get on")


def test_a_run_of_too_many_failures_is_not_simulated():
    (row,) = cost.rows([record()], PACKAGED, tokens=15.6e15, asked=ASKED)
    assert row["run_failures"] > runs.MOST_FAILURES
    assert row["run_goodput_simulated"] is None


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("restart_s=0", "--restart_s=0: expected a number above 0"),
        ("failures_per_device_day=-1", "--failures_per_device_day=-1: expected a number above 0"),
        ("spare_nodes=-1", "--spare_nodes=-1: expected 0 or more"),
        ("runs=-5", "--runs=-5: expected 0 or more"),
        ("checkpoint=asynch", "checkpoint"),
        ("restarts_s=3", "did you mean 'restart_s'"),
    ],
)
def test_wrong_flag_is_refused(flag, said):
    with pytest.raises(RequestError, match=re.escape(said)):
        entry.parse(cost.Request, ["runs", f"--{flag}"])


def test_interval_shorter_than_a_checkpoint_is_refused():
    with pytest.raises(RequestError, match=r"--checkpoint_interval_s=10: .* safe after 51.16 s, .* at least 51"):
        priced(record(), asked=runs.Asked(checkpoint_interval_s=10.0))


def test_cost_and_report_show_whole_runs(tmp_path):
    for n_devices in (1024, 40_960):
        records.append(tmp_path, record(n_devices))

    def run(verb: str, *flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", f"experiments.{verb}", str(tmp_path), "--runs=10", *flags]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    shown = run("cost", "--tokens=15.6e12")
    assert shown.returncode == 0, shown.stderr
    assert "whole run with failures (simulated: mean, and 80 % of 10 runs)" in shown.stdout
    assert "restart_s = 600: Kokolis" in shown.stdout
    rows = json.loads(run("cost", "--tokens=15.6e12", "--json").stdout)
    assert rows == json.loads(run("cost", "--tokens=15.6e12", "--json").stdout)
    done = run("report", "--tokens=15.6e12", "--spare_nodes=50")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.md").read_text()
    for title in ("Whole runs with failures, forecast", "Where the time of a whole run goes, forecast", "Failures"):
        assert f"## {title}\n" in page
    lost = page.partition("## Where the time")[2].partition("\n## ")[0].strip().splitlines()[-1]
    shares = [float(share) for share in re.findall(r"([\d.]+) %", lost)]
    assert len(shares) == len(goodput.Shares._fields)
    assert sum(shares) == pytest.approx(100, abs=0.3)
    without = run("report")
    assert without.returncode == 0, without.stderr
    assert "Whole runs" not in (tmp_path / "report.md").read_text()
    for wrong in ("--spare_nodes=-1", "--checkpoint_interval_s=1"):
        refused = run("report", "--tokens=1e12", wrong)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), wrong
        assert wrong in refused.stderr
