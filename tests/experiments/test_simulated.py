"""Published rows as our own program: what is expressed and what is not, what is kept, and both methods of a row."""

import dataclasses
import json

import pytest

from experiments import entry, records, validate
from experiments.config import RunConfig
from experiments.forecast.closed_form.setup import Setup
from experiments.forecast.closed_form.step import ClosedForm
from experiments.hardware import load
from experiments.validation import score, simulated
from experiments.validation.frameworks import MEGATRON_CORE
from experiments.validation.simulated import PER_OPERATOR, NotExpressed, task_of
from tests.experiments.test_validate import KORTHIKANTI_22B, table
from transformer.errors import RequestError
from transformer.presets import preset
from transformer.sharding import Layout

FACTS = load()
H100 = FACTS.device("h100-sxm")


def setup_of(**changed) -> Setup:
    asked = {"model": preset("llama3-8b"), "layout": Layout(fsdp=8, tensor=2), "seq_len": 2048, "micro_batch_seqs": 2,
             "microbatches": 4, "practice": MEGATRON_CORE}  # fmt: skip
    return Setup(**(asked | changed))


def test_a_row_is_asked_of_our_program_as_it_stands():
    task = task_of(setup_of(remat="full"), H100)
    assert (task.run.resolved_model, task.run.length, task.run.remat) == (preset("llama3-8b"), 2048, "full")
    rung = task.run.rung(16)
    assert (rung.layout, rung.micro_batch_seqs, rung.microbatches) == (Layout(fsdp=8, tensor=2), 2, 4)
    assert task.said == ()
    assert (task.setup.practice.name, task.setup.practice.attention) == ("ladder", "best")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"precision": "fp16"}, "bf16 for fp16"), ({"sequence_parallel": False}, "the sequence is split over tensor"),
        ({"precision": "fp8", "slow_scaling": True}, "fp8 scaled by tensor"), ({"remat": "selective"}, "no remat"),
        ({"layout": Layout(pipeline=3, tensor=8), "model": preset("megatron-22b")}, "51,456 rows of vocabulary"),
    ],
)  # fmt: skip
def test_where_our_program_differs_it_is_said(changed, said):
    task = task_of(setup_of(**changed), H100)
    assert len(task.said) == 1
    assert task.said[0].startswith(said)
    assert task.run.rung(task.setup.layout.n_devices).layout == task.setup.layout
    assert task.run.resolved_model == task.setup.model


def test_every_other_product_of_a_layer_is_kept():
    task = task_of(setup_of(remat="ops"), H100)
    assert (task.run.remat, task.setup.remat) == (PER_OPERATOR, "ops")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"layers_only": True}, "layers alone"), ({"adapters_only": True}, "frozen weights"),
        ({"remat": "full", "remat_share": 0.25}, "remat of 25% of the layers"),
        ({"layout": Layout(fsdp=96)}, "'embed' is 4096, which fsdp=96 does not divide; nearest: fsdp=64"),
        ({"layout": Layout(pipeline=2, repeats=2), "microbatches": 1}, "1 microbatches do not pass in groups of 2"),
        ({"model": preset("t5-small"), "layout": Layout(), "remat": "selective"}, "attention's scores alone"),
    ],
)  # fmt: skip
def test_what_our_program_cannot_do_is_named(changed, reason):
    with pytest.raises(NotExpressed, match=reason):
        task_of(setup_of(**changed), H100)


def test_a_result_is_known_by_all_that_decides_it():
    task = task_of(setup_of(), H100)
    assert task.key == task_of(setup_of(), H100).key
    others = [
        task_of(setup_of(remat="full"), H100), task_of(setup_of(microbatches=8), H100),
        task_of(setup_of(model=preset("llama3-8b", {"n_layers": "31"})), H100),
        task_of(setup_of(), dataclasses.replace(H100, nic_bytes_per_s=25e9)),
    ]  # fmt: skip
    assert len({task.key, *(other.key for other in others)}) == 5


def test_a_flag_or_a_fact_that_is_new_changes_no_result():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Wider(RunConfig):
        newer: int = 7

    task = task_of(setup_of(), H100)
    asked = {f.name: getattr(task.run, f.name) for f in dataclasses.fields(task.run)}
    assert dataclasses.replace(task, run=Wider(**asked)).key == task.key
    assert dataclasses.replace(task, run=Wider(**asked, newer=8)).key != task.key


def test_sources_take_turns_and_stops_are_spread():
    rows = [f"a{i}" for i in range(8)] + ["b0", "b1"]
    found = simulated.in_turn(rows, lambda row: row[0])
    assert sorted(found) == sorted(rows)
    assert found[:4] == ["a0", "b0", "a5", "b1"]


def test_a_task_that_ends_its_process_is_tried_once_more_and_told_of(tmp_path, monkeypatch):
    tasks = [task_of(setup_of(micro_batch_seqs=n), H100) for n in (1, 2, 3)]
    seen = []

    def in_processes(left, processes):
        seen.append([task.run.micro_batch_seqs for task in left])
        for task in list(left):
            if task.run.micro_batch_seqs == 2:
                yield task, None
                return
            yield task, simulated.failed(task, "by hand")

    monkeypatch.setattr(simulated, "_in_processes", in_processes)
    found = list(simulated.simulate(tasks, tmp_path, 2))
    assert seen == [[1, 2, 3], [2], [3]]
    assert [record["failed"] for record in found] == ["by hand", "the compiler ended its process", "by hand"]
    assert list(simulated.kept(tmp_path)) == [task.key for task in tasks]


def test_one_rows_fault_is_its_record(monkeypatch):
    def broken(*args):
        raise AssertionError("a schedule that cannot be read")

    monkeypatch.setattr(simulated, "forecast", broken)
    assert "a schedule that cannot be read" in simulated.simulated(task_of(setup_of(), H100))["failed"]


def row_of(**changed) -> score.Scored:
    return {"batch_scale": 2.0, "measured_step_s": 4.0, "closed_form_s": 3.0, "tokens_per_s": 100.0, "mfu": 0.3,
            "tokens_per_s_per_device": 10.0, "breakdown_s": {"matmul": 2.0, "host": 1.0}} | changed  # fmt: skip


def test_the_schedule_is_carried_over_to_the_framework_by_the_closed_form():
    """Ours takes 1.2 times its closed form, so the framework's step is taken for 1.2 times its own."""
    task, model = task_of(setup_of(), H100), ClosedForm(H100)
    ours_s = model.forecast(task.setup).step_s
    record = {"failed": None, "step_s": {"median": 1.2 * ours_s}, "memory_bytes": {"total": 50e9}, "fits": True,
              "breakdown_s": {"matmul": 1.2 * ours_s}, "hidden_s": {}, "layout": {"attention": "cudnn"}}  # fmt: skip
    found = simulated.beside(row_of(), task, record, model)
    assert found["simulated_ours_s"] == pytest.approx(2 * 1.2 * ours_s)  # of the row's batch
    assert found["ours_ratio"] == pytest.approx(1 / 1.2)
    assert (found["method"], found["step_s"], found["error"]) == ("simulated", pytest.approx(3.6), pytest.approx(-0.1))
    assert sum(found["breakdown_s"].values()) == pytest.approx(3.6)
    assert found["tokens_per_s"] == pytest.approx(100 / 1.2)
    crowded = simulated.beside(row_of(), task, record | {"fits": False}, model)
    assert "step_s" not in crowded  # the compiler makes again what there is no room for: the closed form stands
    assert crowded["simulated_s"] == pytest.approx(3.6)
    assert simulated.beside(row_of(), task, {"failed": "XLA: no"}, model)["not_simulated"] == "XLA: no"


def test_both_methods_are_scored_on_the_same_rows():
    def row(fits, ratio, **errors):
        told = {f"{name}_error": error for name, error in errors.items()}
        return told | {"step_s": 1.0, "error": 0.5, "fits": True, "simulated_s": 1.0, "simulated_ours_fits": fits,
                       "ours_ratio": ratio}  # fmt: skip

    rows = [
        row(True, 1.02, simulated=0.1, closed_form=0.2, simulated_ours=-0.3),
        row(True, 0.9, simulated=-0.2, closed_form=0.0, simulated_ours=-0.1),
        row(False, 0.5, simulated=9.0, closed_form=9.0, simulated_ours=9.0),
        {"step_s": 1.0, "error": 0.5, "fits": True},
    ]
    found = score.scores(rows)
    assert (found["compared"], found["simulated"], found["simulated_fits"]) == (4, 3, 2)
    assert (found["simulated_mape_pct"], found["closed_form_mape_pct"], found["simulated_ours_mape_pct"]) == (
        15,
        10,
        20,
    )
    assert (found["ours_median_pct"], found["ours_bias_pct"], found["ours_90_pct"]) == (6, -4, 10)
    assert "simulated" not in score.scores(rows[3:])


@pytest.mark.deviceless
def test_rows_are_simulated_once_and_a_run_goes_on(tmp_path, capfd):
    small = KORTHIKANTI_22B | {
        "source_id": "small", "model_name": "gpt-small", "layers": "2", "d_model": "1024", "n_heads": "16", "n_kv_heads": "16",
        "d_ff": "4096", "seq_len": "1024", "device": "H100-80G-SXM", "n_devices": "1", "tp": "1", "precision": "bf16",
        "remat": "none", "step_time_s": "0.02",
    }  # fmt: skip
    rows = [
        small,
        small | {"micro_batch": "2"},
        small | {"source_id": "other"},
        small | {"model_name": "gpt-small LoRA"},
    ]
    argv = [f"--table={table(tmp_path / 't.csv', rows)}", f"--out={tmp_path / 'out'}", "--processes=1", "--json"]

    def run(*more):
        assert validate.main(entry.parse(validate.ValidateRequest, [*argv, *more])) == 0
        printed = json.loads(capfd.readouterr().out)
        return printed, [json.loads(line) for line in (tmp_path / "out" / validate.ROWS).read_text().splitlines()]

    printed, written = run("--simulate=1")
    assert printed["simulated"] == 2  # the first and the third are the same program
    assert [row.get("not_simulated") for row in written[:3]] == [None, "not yet", None]
    assert "frozen weights" in written[3]["not_simulated"]
    assert [row["method"] for row in written] == ["simulated", "closed_form", "simulated", "closed_form"]
    assert sum(written[0]["simulated_ours_breakdown_s"].values()) == pytest.approx(written[0]["simulated_ours_s"])
    kept = (tmp_path / "out" / records.FILE).read_text()
    assert kept.count("\n") == 1
    printed, written = run()
    assert printed["simulated"] == 3
    assert (tmp_path / "out" / records.FILE).read_text().startswith(kept)
    assert written[1]["simulated_s"] > written[1]["closed_form_ours_s"] * 0.5
    last = (tmp_path / "out" / records.FILE).read_bytes()
    run()
    assert (tmp_path / "out" / records.FILE).read_bytes() == last
    text = (tmp_path / "out" / validate.TABLES).read_text()
    assert "3 rows are simulated too" in text
    assert "- not simulated, 1 rows, first t.csv, line 5: frozen weights with adapters (LoRA)" in text


def test_ranges_are_of_the_closed_form():
    with pytest.raises(RequestError, match="--interval_to=x.json: ranges are of the closed form; give --fast too"):
        entry.parse(validate.ValidateRequest, ["--table=t.csv", "--interval_to=x.json"])
    with pytest.raises(RequestError, match="--processes=0: expected at least 1"):
        entry.parse(validate.ValidateRequest, ["--table=t.csv", "--processes=0"])
