"""Published runs as rungs, and the table of what they send."""

import json

import pytest

from experiments import compile_check
from experiments.forecast.traffic import compared
from experiments.hardware import load
from transformer.backends import Chip
from transformer.errors import RequestError


@pytest.mark.parametrize("run", compile_check.published(), ids=lambda run: run["preset"])
def test_a_published_run_is_a_rung(run):
    load().device(run["device"])
    rung = compile_check.config_of(run).rung(run["devices"])
    assert rung.global_batch_seqs == run["global_batch_seqs"]
    assert rung.failed is None


def test_each_is_compiled_once_and_what_it_sends_is_told(tmp_path, monkeypatch, capsys):
    calls = []

    def forecast(run, rung, device, cluster, advance):
        calls.append(run.preset)
        sent = compared({"tensor all-gather": 3e9}, {"tensor all-gather": 2e9})
        found = run.record(rung, kind="forecast", device=device.slug, chip=Chip("gpu", (8, 0)))
        found |= {"step_s": {"median": 1.0}, "memory_bytes": {"total": 30e9, "limit": 80e9}, "fits": True}
        return found | {"compile_s": 7.0, "collectives": sent}

    runs = [run for run in compile_check.published() if run["preset"] in ("megatron-22b", "palm-540b")]
    runs = [run | {"seq_len": 2048} for run in runs]  # which PaLM's tensor axis of 12 does not split
    monkeypatch.setattr(compile_check, "published", lambda: runs)
    monkeypatch.setattr(compile_check, "forecast", forecast)
    monkeypatch.setattr(compile_check, "devices_of", lambda device, n: [])
    asked = compile_check.Request(presets=("megatron-22b", "palm-540b"), out=str(tmp_path))
    assert [compile_check.main(asked), compile_check.main(asked)] == [1, 1]
    assert calls == ["megatron-22b"]
    told = capsys.readouterr()
    assert "| `tensor=8` x 1 | 7 s | 30 | tensor all-gather 3 (1.500) |" in told.out
    assert "refused" in told.out
    assert "megatron-22b: tensor all-gather: 3.00 GB a step, where the layout needs 2.00" in told.err
    kept = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [(r["preset"], r["source"][:11]) for r in kept] == [("megatron-22b", "Korthikanti")]


def test_a_preset_without_a_published_run_is_refused():
    with pytest.raises(RequestError, match="'megatron-22' has no published run here: did you mean 'megatron-22b'"):
        compile_check.Request(presets=("megatron-22",))
