"""Ranges: what they hold on rows made by hand, the table that ships, and what a record says of its own."""

import csv
import dataclasses
import json
import math
import random
import re

import pytest

from experiments import entry, validate
from experiments.forecast import interval
from experiments.forecast.interval import LARGEST, SCALES, Backtests, Standing, Width
from experiments.validation import backtest, plots
from experiments.validation.fitted import fitted
from transformer.errors import RequestError

GPT_22B = {
    "model_name": "gpt-22B", "layers": "48", "d_model": "6144", "n_heads": "64", "vocab": "51200", "seq_len": "2048",
    "device": "A100-80G-SXM", "n_devices": "8", "tp": "8", "global_batch_seqs": "4", "micro_batch": "4",
    "precision": "fp16", "remat": "full", "software": "Megatron-LM 2022",
}  # fmt: skip
"""Korthikanti et al. 2022 (arXiv:2205.05198), tables 3 and 5: 1.42 s."""
NEAR = Standing("h100-sxm", "nemo", 64, context_or_experts=False)


def runs(spread: dict[str, list[float]], standing: Standing = NEAR) -> list[backtest.Run]:
    return [backtest.Run(source, standing, miss) for source, misses in spread.items() for miss in misses]


def test_quantile_by_hand():
    """Weights 1/sqrt(n): 2 sources of 1 row weigh 1 each, the one of 4 rows 2, half of each row's 0.5: 4 in all."""
    group = backtest._group(runs({"a": [0.05], "b": [0.9], "c": [0.1, 0.2, 0.3, 0.4]}))
    assert group is not None
    assert (group.rows, group.sources) == (6, 3)
    assert list(group.weight) == pytest.approx([0.25, 0.375, 0.5, 0.625, 0.75, 1.0])
    assert [group.quantile(level).half_width for level in (0.25, 0.5, 0.7, 0.75, 0.76)] == [0.05, 0.2, 0.4, 0.4, 0.9]


def test_a_large_source_does_not_decide():
    """Of rows alike 200 of 240 miss by 0.01, and 80 % would be held by that; of weight it is 14 to 12.6."""
    small = {name: [0.02 * (n + 1) for n in range(10)] for name in "abcd"}
    found = backtest.backtests(runs(small | {"large": [0.01] * 200}), "")
    assert found.widths["", 1, 0].half_width > 0.05


def test_left_out_rows_are_held_as_often_as_said():
    """Ten sources of one noise: 80 % of each is held by what the nine others say, which the tenth cannot move."""
    draw = random.Random(0)
    spread = {f"source {n}": [math.exp(abs(draw.gauss(0, 0.1))) - 1 for _ in range(200)] for n in range(10)}
    found = backtest.backtests(runs(spread), "command")
    held = [miss <= found.range_of(NEAR, source).half_width for source, misses in spread.items() for miss in misses]
    assert sum(held) / len(held) == pytest.approx(0.8, abs=0.02)
    assert found.range_of(NEAR).half_width == pytest.approx(math.exp(1.2816 * 0.1) - 1, rel=0.1)  # of a normal, 80 %


def test_what_is_left_out_does_not_move_its_own_range(monkeypatch):
    monkeypatch.setattr(backtest, "LEVELS", (0.9,))
    good = {name: [0.1, 0.2, 0.3] for name in "abcdef"}
    before, after = (backtest.backtests(runs(good | {"a": misses}), "") for misses in ([0.1] * 3, [2.0] * 3))
    assert after.range_of(NEAR, "a") == before.range_of(NEAR, "a")
    assert after.range_of(NEAR, "b").half_width > before.range_of(NEAR, "b").half_width


def test_own_source_and_the_one_left_out_are_no_ground():
    ground = {("h100-sxm", "nemo"): frozenset({"a", "b"})}
    assert interval.far(NEAR, ground, {""})[0] == interval.far(NEAR, ground, {"a"})[0] == 0
    assert interval.far(NEAR, ground, {"a", "b"})[0] == 1
    mixed = dataclasses.replace(NEAR, device="tpu-v7", context_or_experts=True)
    distance, why = interval.far(mixed, ground, {""})
    assert distance == len(why) == interval.FARTHEST
    assert "tpu-v7" in why[0]


def test_group_of_few_sources_is_taken_with_other_scales_and_never_narrower_than_nearer_ground():
    near = runs({name: [0.1, 0.3] for name in "abcdef"})
    lone = [backtest.Run("a", Standing("tpu-v4", "xla", 8, False), 0.05)]  # one source, and it did better
    found = backtest.backtests(near + lone, "")
    one_node, far = found.widths["", 0, 0], found.widths["", 0, 1]
    assert (one_node.half_width, one_node.sources) == (found.widths["", 1, 0].half_width, 6)  # no such run on a node
    assert (far.half_width, far.rows, far.sources) == (one_node.half_width, 1, 1)


@pytest.mark.parametrize("left_out", ["", *sorted(interval.published().sources)])
def test_shipped_table_has_every_group_and_widens_with_distance(left_out):
    found = interval.published()
    for scale in range(len(SCALES)):
        widths = [found.widths[left_out, scale, d].half_width for d in range(interval.FARTHEST + 1)]
        assert 0.03 < widths[0] < 0.5
        assert widths == sorted(widths)


def test_shipped_table_rests_on_many_sources_that_it_names():
    found = interval.published()
    assert found.made["rows"] > 1000
    assert found.made["sources"] == len(found.sources) >= 15
    assert all(width.sources >= 4 for (left_out, *_), width in found.widths.items() if not left_out)
    assert "--interval_to" in found.made["command"]


@pytest.mark.parametrize("distant", [False, True])
def test_beyond_the_largest_measured_run_a_range_widens_and_says_why(distant):
    ranges = [
        interval.published().range_of(Standing("h100-sxm", "xla", n, distant))
        for n in (LARGEST, 16_385, 40_960, 65_536)
    ]
    widths = [one.half_width for one in ranges]
    assert widths == sorted(set(widths))
    assert 1 + widths[3] == pytest.approx((1 + widths[0]) ** 2)  # four times the devices
    assert "no public measurement exists above 16,384 GPUs" not in ranges[0].reason
    assert all("no public measurement exists above 16,384 GPUs" in one.reason for one in ranges[1:])


def test_range_is_around_the_forecast():
    ends = interval.Range(0.25, 0, "").around(2.0)
    assert ends == {"median": 2.0, "low": 1.6, "high": 2.5}


def test_table_is_read_as_it_was_written(tmp_path):
    found = Backtests(
        ground={("h100-sxm", "nemo"): frozenset({"b", "a"})}, widths={("", 1, 2): Width(0.125, 7, 2)}, made={"rows": 7}
    )
    interval.write(tmp_path / "t.json", found)
    assert interval.read(tmp_path / "t.json") == found
    json.loads((tmp_path / "t.json").read_text())


def test_too_few_sources_and_a_folder_that_is_not_there_are_refused(tmp_path):
    with pytest.raises(RequestError, match="of 2 sources, expected 5 or more"):
        backtest.backtests(runs({"a": [0.1], "b": [0.2]}), "")
    with pytest.raises(RequestError, match=r"none/t\.json: cannot be written"):
        interval.write(tmp_path / "none" / "t.json", interval.published())


def done(source: str, n_devices: int, error: float, **changed) -> dict:
    """A row as `validate` has it, of a measured second."""
    row = {
        "source_id": source, "place": "t.csv, line 2", "model_name": "m<1>", "device": "H100", "n_devices": n_devices,
        "seq_len": 2048, "precision": "bf16", "practice": "nemo", "layout": "data=8", "global_batch_seqs": 4 * n_devices,
        "micro_batch": 1, "remat": "none",
        "standing": dataclasses.asdict(dataclasses.replace(NEAR, n_devices=n_devices)), "tokens": 4 * 2048 * n_devices,
        "step_s": 1 + error, "measured_step_s": 1.0, "error": error, "fits": True, "quality": "A",
    }  # fmt: skip
    return row | changed


def test_rows_carry_their_range_and_whether_it_holds_them():
    table = interval.published()
    width = table.widths["dgxc_nemo", 1, 0].half_width
    inside, outside = done("dgxc_nemo", 64, 0.9 * width), done("dgxc_nemo", 64, 1.1 * width)
    assert backtest.ranged(inside, table)["held"]
    found = backtest.ranged(outside, table)
    assert not found["held"]
    assert found["low_s"] * (1 + width) == pytest.approx(outside["step_s"]) == found["high_s"] / (1 + width)
    rows = [row | backtest.ranged(row, table) for row in (inside, outside, done("new", 64, 0.0))]
    told = backtest.summary(rows, table)
    assert (told["held_pct"], told["held_pct_mean_of_sources"], told["not_left_out"]) == (66.7, 75.0, ["new"])
    assert told["by_distance"] == [{"distance": 0, "rows": 3, "held_pct": 66.7}]


def test_weak_scaling_series_and_the_page():
    rows = [done("a", n, 0.1 * n / 64) for n in (64, 8, 16)]
    rows += [done("a", 16, 0.3, measured_step_s=2.0, step_s=2.6), done("b", 8, 0.0), done("b", 16, 0.0)]
    rows = [row | backtest.ranged(row, interval.published()) for row in rows]
    ((name, along),) = plots.series(rows)["a"]  # b has two counts only
    assert [row["n_devices"] for row in along] == [8, 16, 64]
    assert along[1]["measured_step_s"] == 1.0  # the faster of two
    assert "4 sequences a device" in name
    summary = validate.summarise(rows) | {
        "interval": backtest.summary(rows, interval.published()), "fitted": fitted(interval.published())
    }  # fmt: skip
    page = plots.page(rows, summary)
    assert "Weak scaling" in page
    assert "IN_STEP (1.08)" in page
    assert "m&lt;1&gt;" in page
    assert "m\\u003c1" not in page  # as the script would write one that is not escaped


def test_fitted_constants_are_counted_once_each():
    found = fitted(interval.published())
    names = [one["name"] for one in found["names"]]
    assert found["constants"] == len(names) == len(set(names))
    assert {"IN_STEP", "ASYNC_TENSOR", "DCN_EFFICIENCY", "quantile of the ranges"} <= {
        one["name"] for one in found["names"] if one["on_tables"]
    }
    assert "GPU_LAUNCH_S" not in names  # read, not fitted


def test_verb_makes_a_table_of_its_rows(tmp_path, capsys):
    pairs = [(str(n), f"{1.42 * (1 + n / 20):.3f}") for n in range(6)]
    rows = [GPT_22B | {"source_id": f"s{n}", "step_time_s": t} for n, t in pairs]
    made = tmp_path / "made.json"
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    argv = [
        f"--table={tmp_path / 'a.csv'}",
        f"--out={tmp_path / 'out'}",
        f"--interval_to={made}",
        "--json",
    ]
    assert validate.main(entry.parse(validate.ValidateRequest, [*argv, "--fast"])) == 0
    printed = json.loads(capsys.readouterr().out)
    assert interval.read(made).sources == {f"s{n}" for n in range(6)}
    assert str(tmp_path) not in made.read_text()
    assert printed["interval"]["made"]["rows"] == 6
    assert printed["fitted"]["constants"] > 10
    head, *lines = (tmp_path / "out" / validate.LINES).read_text().splitlines()
    assert len(lines) == 6
    assert {"low_s", "high_s", "held"} <= set(head.split(","))
    assert re.search(r"they hold [\d.]+ % of rows", (tmp_path / "out" / validate.TABLES).read_text())
