"""The ladder on virtual devices: what a record says, and that a rung that fails is a result."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from experiments import entry, ladder, measure, records, step

TINY = ["--model.n_layers=2", "--seq_len=32", "--micro_batch_seqs=1", "--steps=2", "--warmup_steps=1", "--remat=none"]
SEEN = measure.Measurement(
    step_s=[0.1, 0.3],
    compile_s=1.0,
    compile_kept=False,
    warnings=[],
    memory_bytes={"total": 1},
    peak_bytes=None,
    loss=5.6,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A text, and a cache of its own."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text("".join(f"{i} green bottles, standing on the wall.\n" for i in range(400)))
    return folder


@pytest.fixture(autouse=True)
def _cache(corpus, monkeypatch):
    monkeypatch.setenv("LADDER_CACHE", str(corpus / "cache"))


def run(corpus, out, *argv):
    """The exit code, and the records in order."""
    request = entry.parse(ladder.LadderRequest, [*TINY, f"--dataset=text:{corpus}/*.txt", f"--out={out}", *argv])
    code = ladder.main(request)
    return code, list(records.read_all(out))


@pytest.fixture(scope="module")
def measured(corpus, tmp_path_factory):
    """The records of 1, 2 and 8 devices, the last in all three axes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LADDER_CACHE", str(corpus / "cache"))
        layout = "--layout=1:;8:fsdp=2,tensor=2"
        code, found = run(corpus, tmp_path_factory.mktemp("ladder"), "--devices=1,2,8", layout)
    assert code == 0
    return found


def test_one_record_a_rung_in_order(measured):
    assert [r["n_devices"] for r in measured] == [1, 2, 8]
    axes = [{k: r["layout"][k] for k in ("data", "fsdp", "tensor")} for r in measured]
    assert axes[-1] == {"data": 2, "fsdp": 2, "tensor": 2}
    assert [r["global_batch_seqs"] for r in measured] == [1, 2, 4]


@pytest.mark.parametrize("rung", range(3))
def test_record_has_what_the_schema_promises(measured, rung):
    record = measured[rung]
    records.check(record, where="here")
    promised = {
        "schema",
        "kind",
        "preset",
        "model",
        "config",
        "device",
        "device_kind",
        "n_devices",
        "layout",
        "scaling",
    }
    promised |= {"global_batch_seqs", "seq_len", "step_s", "compile_s", "tokens_per_s", "tokens_per_s_per_device"}
    promised |= {"mfu", "hfu", "memory_bytes", "fits", "energy_j", "failed", "versions", "commit", "command", "created"}
    assert promised <= set(re.findall(r"\w+", records.__doc__))
    assert promised <= record.keys()
    assert (record["kind"], record["device"], record["device_kind"], record["failed"]) == (
        "measured",
        "cpu",
        "cpu",
        None,
    )
    assert record["model"]["n_layers"] == 2
    assert record["config"]["devices"] == [1, 2, 8]
    layout = record["layout"]
    assert (layout["precision"], layout["attention"], layout["remat"], layout["microbatches"]) == (
        "f32",
        "xla",
        "none",
        1,
    )


@pytest.mark.parametrize("rung", range(3))
def test_numbers_of_a_record_agree(measured, rung):
    record = measured[rung]
    step_s = record["step_s"]
    assert len(step_s["all"]) == 2
    assert step_s["median"] == pytest.approx(np.median(step_s["all"]), rel=1e-12)
    assert min(step_s["all"]) <= step_s["low"] <= step_s["median"] <= step_s["high"] <= max(step_s["all"])
    tokens = record["global_batch_seqs"] * record["seq_len"]
    assert record["tokens_per_s"] == pytest.approx(tokens / step_s["median"], rel=1e-12)
    assert record["tokens_per_s_per_device"] == pytest.approx(record["tokens_per_s"] / record["n_devices"], rel=1e-12)
    memory = dict(record["memory_bytes"])
    total, _ = memory.pop("total"), memory.pop("limit")
    assert total == sum(memory.values())
    assert min(memory.values()) >= 0
    assert record["compile_s"] > 0
    assert 4 < record["loss"] < 7  # ln 264 is 5.6


def test_state_is_split_as_the_layout_says(measured):
    alone, copied, split = (r["memory_bytes"]["optimizer"] for r in measured)
    assert copied == alone
    assert alone / 5 < split < alone / 3  # two by fsdp, two by tensor; vectors are on every tensor shard


def test_cpu_has_no_utilisation_and_no_watts(measured):
    for record in measured:
        assert record["mfu"] == {"full": None, "causal": None}
        assert (record["hfu"], record["energy_j"], record["memory_bytes"]["limit"]) == (None, None, None)


def test_virtual_devices_are_said_to_be_virtual(measured):
    assert measured[0]["note"] is None
    for record in measured[1:]:
        assert "virtual devices" in record["note"]
        assert "not that it scales" in record["note"]


def test_rung_that_fails_is_recorded_and_the_ladder_goes_on(corpus, tmp_path, monkeypatch, capsys):
    def fail(_):
        raise RuntimeError("RESOURCE_EXHAUSTED:\n  out of memory")

    whole = ladder.train_step
    broken = type("Broken", (step.TrainStep,), {"step": property(fail)})

    def by_size(run, rung, devices):
        made = whole(run, rung, devices)
        return made if rung.n_devices == 1 else broken(config=run.resolved_model, mesh=made.mesh)

    monkeypatch.setattr(ladder, "train_step", by_size)
    code, (failed, good) = run(corpus, tmp_path, "--devices=2,1")
    assert code == 1
    assert failed["failed"] == "RuntimeError: RESOURCE_EXHAUSTED: out of memory"
    assert "step_s" not in failed
    assert (good["n_devices"], good["failed"]) == (1, None)
    assert "2 devices failed: RuntimeError: RESOURCE_EXHAUSTED: out of memory" in capsys.readouterr().out


def test_loss_that_is_no_number_is_a_failed_rung(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "measure", lambda *_, **__: dataclasses.replace(SEEN, loss=float("nan")))
    code, (record,) = run(corpus, tmp_path)
    assert (code, record["failed"]) == (1, "FloatingPointError: loss is nan after 3 steps")


def test_strong_scaling_records_what_has_too_many_shards(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "measure", lambda *_, **__: SEEN)
    code, found = run(corpus, tmp_path, "--devices=2,4", "--global_batch_seqs=2")
    assert code == 1
    assert [(r["scaling"], r["global_batch_seqs"]) for r in found] == [("strong", 2)] * 2
    assert [r["failed"] for r in found] == [
        None,
        "4 data shards for 2 sequences: the largest count that works is 2 devices",
    ]


def test_same_rung_again_is_one_rung(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "measure", lambda *_, **__: SEEN)
    for _ in range(2):
        run(corpus, tmp_path)
    assert len(list(records.read_all(tmp_path))) == 2
    assert len(records.read(tmp_path)) == 1


def test_json_is_all_that_standard_output_has(corpus, tmp_path):
    argv = [*TINY, f"--dataset=text:{corpus}/*.txt", f"--out={tmp_path}", "--devices=1", "--json"]
    command = [sys.executable, "-m", "experiments.ladder", *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == records.read(tmp_path)
    assert "1 records in" in done.stderr
    (record,) = records.read(tmp_path)
    assert record["command"].startswith("python -m experiments.ladder --model.n_layers=2 ")


def test_a_second_start_compiles_nothing(corpus, tmp_path):
    """The train step, and whatever runs around it: no program is added to those that the first start kept."""
    kept = tmp_path / "cache" / "compiled"
    command = [sys.executable, "-m", "experiments.ladder", *TINY, "--devices=1", f"--dataset=text:{corpus}/*.txt"]
    found = []
    for start in ("first", "second"):
        out = tmp_path / start
        env = os.environ | {"LADDER_CACHE": str(tmp_path / "cache"), "JAX_ENABLE_COMPILATION_CACHE": "true"}
        subprocess.run([*command, f"--out={out}"], check=True, capture_output=True, env=env, timeout=300)
        (record,) = records.read_all(out)
        found.append((record["compile_kept"], record["warnings"], sorted(path.name for path in kept.glob("*-cache"))))
    (*first, programs), (*second, again) = found
    assert (first, second) == ([False, []], [True, None])  # a compiler that was not asked says nothing
    assert len(programs) > 3
    assert again == programs
