from pathlib import Path

import pytest

from experiments import records
from launch import collect, spec
from transformer.errors import RequestError


def record(n_devices: int, **more) -> records.Record:
    step_s = {"median": 0.1, "low": 0.1, "high": 0.1}
    return {
        "schema": 1, "kind": "measured", "preset": "tiny", "model": {}, "device": "cpu", "n_devices": n_devices,
        "layout": {"data": n_devices}, "scaling": "weak", "seq_len": 8, "step_s": step_s,
    } | more  # fmt: skip


@pytest.fixture
def ladder(tmp_path) -> spec.LadderSpec:
    return spec.parse({"name": "t", "out": str(tmp_path / "out"), "devices": [2, 4]})


def fill(ladder: spec.LadderSpec) -> Path:
    for job, n in zip(ladder.jobs(), (2, 4), strict=True):
        records.append(job.folder, record(n))
    return ladder.folder / records.FILE


def test_collecting_twice_gives_the_same_file(ladder):
    file = fill(ladder)
    assert collect.collect(ladder) == 0
    once = file.read_bytes()
    assert [r["n_devices"] for r in records.read_all(ladder.folder)] == [2, 4]
    assert collect.collect(ladder) == 0
    assert file.read_bytes() == once


def test_a_rung_that_ran_again_counts_from_its_last_record(ladder):
    fill(ladder)
    collect.collect(ladder)
    records.append(ladder.jobs()[0].folder, record(2, step_s={"median": 9.0, "low": 9.0, "high": 9.0}))
    collect.collect(ladder)
    assert [r["step_s"]["median"] for r in records.read(ladder.folder)] == [9.0, 0.1]


def test_records_of_others_stay(ladder):
    fill(ladder)
    records.append(ladder.folder, record(40960, kind="forecast"))
    collect.collect(ladder)
    assert [r["n_devices"] for r in records.read_all(ladder.folder)] == [40960, 2, 4]


def test_corrupt_records_are_named_and_the_rest_is_collected(ladder, capsys):
    fill(ladder)
    bad = ladder.jobs()[0].folder / records.FILE
    bad.write_text(bad.read_text() + '{"schema": 1, "kind"')
    assert collect.collect(ladder) == 1
    assert f"rung-0002: {bad}:2: not a JSON object" in capsys.readouterr().err
    assert [r["n_devices"] for r in records.read_all(ladder.folder)] == [2, 4]  # what precedes it is whole


def test_corrupt_collection_is_left_alone(ladder):
    file = fill(ladder)
    file.write_text("half a line")
    with pytest.raises(RequestError, match=r"out/records\.jsonl:1"):
        collect.collect(ladder)
    assert file.read_text() == "half a line"


def test_ladder_without_any_record_makes_no_file(ladder, capsys):
    assert collect.collect(ladder) == 2
    assert "rung-0002: no records.jsonl" in capsys.readouterr().err
    assert not ladder.folder.exists()


def test_main_says_by_its_exit_code_whether_all_is_there(ladder, tmp_path):
    file = tmp_path / "ladder.toml"
    file.write_text(f'name = "t"\nout = "{ladder.out}"\ndevices = [2, 4]\n')
    assert collect.main(collect.Collect(str(file))) == 1
    fill(ladder)
    assert collect.main(collect.Collect(str(file))) == 0
