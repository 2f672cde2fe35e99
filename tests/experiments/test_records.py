"""Records cross from running to reporting whole or not at all."""

import json
import os
import subprocess
import sys

import pytest

from experiments import records
from transformer.errors import RequestError


def record(**changes) -> records.Record:
    return {
        "schema": 1,
        "kind": "measured",
        "preset": "tiny",
        "model": {"n_layers": 8},
        "device": "h100-sxm",
        "n_devices": 8,
        "layout": {"data": 8, "fsdp": 1, "tensor": 1, "microbatches": 1, "remat": "full", "attention": "xla"},
        "scaling": "weak",
        "global_batch_seqs": 64,
        "seq_len": 256,
        "step_s": {"median": 0.1, "low": 0.1, "high": 0.2},
        "failed": None,
    } | changes


@pytest.mark.smoke
def test_what_was_appended_is_read(tmp_path):
    folder = tmp_path / "runs" / "new"
    written = [record(), record(n_devices=16), record(failed="ran out of memory", step_s=None)]
    for one in written:
        records.append(folder, one)
    assert list(records.read_all(folder)) == written
    assert len((folder / records.FILE).read_text().splitlines()) == 3


def test_latest_of_the_same_rung_counts(tmp_path):
    again = record(step_s={"median": 0.3, "low": 0.3, "high": 0.3}, created="later")
    for one in (record(), record(n_devices=16), again):
        records.append(tmp_path, one)
    assert records.read(tmp_path) == [again, record(n_devices=16)]


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "forecast"},
        {"preset": "gpt2-124m"},
        {"model": {"n_layers": 2}},
        {"device": "cpu"},
        {"n_devices": 4},
        {"scaling": "strong"},
        {"seq_len": 128},
        {"global_batch_seqs": 32},
        {"layout": record()["layout"] | {"remat": "none"}},
        {"layout": record()["layout"] | {"attention": "cudnn"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_was_asked_for_differently_is_another_rung(change):
    assert records.rung_key(record()) != records.rung_key(record(**change))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"schema": 1, "kind"', "not a JSON object"),
        (b"\xff\xfe", "not text"),
        (b"[1, 2]", "a record is a JSON object, not list"),
        (b"{}", "key 'schema' is None, expected int"),
        (json.dumps(record(schema=2)).encode(), "schema 2, this version reads 1"),
        (json.dumps(record(n_devices="8")).encode(), "key 'n_devices' is '8', expected int"),
        (json.dumps(record(n_devices=True)).encode(), "key 'n_devices' is True, expected int"),
        (json.dumps(record(kind="guessed")).encode(), "kind 'guessed', expected 'measured' or 'forecast'"),
        (json.dumps(record(step_s=None)).encode(), "neither step_s nor a reason in failed"),
    ],
)
def test_corrupt_line_is_named_by_its_number(tmp_path, line, message):
    (tmp_path / records.FILE).write_bytes(json.dumps(record()).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(RequestError) as caught:
        records.read(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / records.FILE}:3: ")
    assert message in str(caught.value)


def test_folder_without_records_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"no records\.jsonl in .*none.*: run experiments\.ladder"):
        records.read(tmp_path / "none")


def test_record_that_no_reader_would_take_is_not_written(tmp_path):
    with pytest.raises(RequestError, match="new record: kind 'guessed'"):
        records.append(tmp_path, record(kind="guessed"))
    with pytest.raises(ValueError, match="Out of range float"):
        records.append(tmp_path, record(tokens_per_s=float("nan")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file", "file/below", "file/below/that"])
def test_folder_that_cannot_be_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RequestError, match="file is a file; expected a folder"):
        records.append(tmp_path / name, record())
    assert (tmp_path / "file").read_text() == "mine"


def test_folder_that_may_not_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(RequestError, match=f"--out={tmp_path}/new: {tmp_path} is not writable"):
        records.check_out(tmp_path / "new")


def test_file_is_replaced_whole_and_others_may_read_it(tmp_path):
    path = tmp_path / "new" / "page.html"
    for text in ("first", "second, and é"):
        records.write_whole(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["replace", "chmod"])
def test_old_file_stays_when_writing_fails(tmp_path, monkeypatch, failing):
    path = tmp_path / "page.html"
    path.write_text("old")

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="the disk is full"):
        records.write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


APPEND = """
import json, sys
from pathlib import Path
from experiments import records

record = json.loads(sys.argv[2])
for number in range(50):
    records.append(Path(sys.argv[1]), record | {"seq_len": number})
"""


def test_two_processes_append_whole_lines(tmp_path):
    presets = ["a" * 20_000, "b" * 20_000]
    commands = [[sys.executable, "-c", APPEND, str(tmp_path), json.dumps(record(preset=name))] for name in presets]
    writers = [subprocess.Popen(command) for command in commands]
    assert [writer.wait() for writer in writers] == [0, 0]
    found = list(records.read_all(tmp_path))
    for name in presets:
        assert [r["seq_len"] for r in found if r["preset"] == name] == list(range(50))


def test_provenance_says_what_ran(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "--layout=8:fsdp=2;16:fsdp=4", "--out=a b"])
    found = records.provenance()
    assert {"python", "jax", "jaxlib", "flax", "optax"} <= found["versions"].keys()
    assert found["commit"] is None or len(found["commit"].rstrip("+")) == 40
    assert found["command"].startswith("python -m ")
    assert found["command"].endswith("'--layout=8:fsdp=2;16:fsdp=4' '--out=a b'")
    assert found["created"].endswith("+00:00")


def test_provenance_outside_a_checkout_has_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert records.provenance()["commit"] is None
