"""The search for a layout: all that can be, what fits, why the others lose, and the cheapest rung."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest

from experiments import entry, plan, records
from experiments.config import RunConfig
from experiments.forecast.closed_form.memory import held, in_flight, memory_bytes
from experiments.forecast.closed_form.practice import ours
from experiments.forecast.closed_form.setup import Setup
from experiments.forecast.closed_form.step import ClosedForm, Forecast
from experiments.hardware import load
from experiments.planning.rungs import Plan, cheapest, rung
from experiments.planning.search import REMATS, Found, Option, Search, front, lean, reason
from experiments.planning.space import REPEATS, divisors, fed, splits
from transformer.errors import RequestError
from transformer.layouts import Split, check
from transformer.presets import preset
from transformer.sharding import AXES, Layout

H100 = load().device("h100-sxm")


def brute_force(config, n_devices, *, length, batch_seqs, most_tensor, slices=1):
    """Every layout that multiplies to the devices, as `check` alone tells them."""
    for sizes in itertools.product(divisors(n_devices), repeat=len(AXES)):
        if math.prod(sizes) != n_devices or sizes[0] != slices or sizes[-1] > most_tensor:
            continue
        for zero, repeats in itertools.product((1, 2, 3), REPEATS):
            layout = Layout(**dict(zip(AXES, sizes, strict=True)), zero=zero, repeats=repeats)
            if zero != 3 and layout.split(("fsdp", "expert", "context")) == 1:
                continue  # there is nothing to split
            for m in range(1, batch_seqs + 1):
                split = Split(layout, m)
                if batch_seqs % (layout.data_shards * m):
                    continue
                try:
                    check(config, split, length=length)
                except RequestError:
                    continue
                yield split


@pytest.mark.parametrize(
    ("name", "overrides", "n", "slices", "length"),
    [
        ("tiny", {}, 8, 1, 64),
        ("tiny", {"n_experts": "4"}, 8, 1, 64),
        # Where axes go alone and not together: 12 into 2 x 4.
        ("tiny", {"d_model": "12", "n_heads": "4", "n_kv_heads": "4", "d_head": "4", "d_ff": "16"}, 8, 1, 12),
        ("tiny", {"d_model": "24", "n_heads": "6", "n_kv_heads": "3", "d_ff": "36", "n_layers": "6"}, 6, 1, 64),
        ("t5-small", {}, 4, 1, 64),
        ("tiny", {}, 8, 2, 64),
    ],
)
def test_space_is_all_that_check_does_not_refuse(name, overrides, n, slices, length):
    asked = {"length": length, "batch_seqs": 12, "most_tensor": 4, "slices": slices}
    found = list(splits(preset(name, overrides), n, **asked))
    assert len(found) == len(set(found)) > 10
    assert set(found) == set(brute_force(preset(name, overrides), n, **asked))


def test_one_layout_is_fed_in_every_way_or_refused():
    config = preset("tiny")
    assert [m for _, m in fed(config, Layout(data=2), length=64, batch_seqs=12)] == [1, 2, 3, 6]
    assert [m for _, m in fed(config, Layout(pipeline=2, repeats=2), length=64, batch_seqs=6)] == [2, 6]
    with pytest.raises(RequestError, match="12 sequences do not divide over 8 data shards; nearest: 16"):
        fed(config, Layout(data=8), length=64, batch_seqs=12)
    with pytest.raises(RequestError, match="do not pass in groups of 2"):
        fed(config, Layout(pipeline=2, repeats=2), length=64, batch_seqs=3)


def search_of(name, device=H100, fill=1.0, **run):
    return Search(RunConfig(preset=name, **run), device, fill)


def test_what_is_not_asked_would_not_fit():
    """Options skipped because a smaller one did not fit: every one of them by itself."""
    search = search_of("llama3-8b", seq_len=8192)
    known = list(splits(preset("llama3-8b"), 8, length=8192, batch_seqs=32, most_tensor=8))
    found = search.best(known, 32)
    each = [search.option(layout, 32 // layout.data_shards // m, m, remat) for layout, m in known for remat in REMATS]
    fitting = [option for option in each if option.fits]
    assert found.n_tried == len(each) > len(fitting) > 100
    assert set(found.fitting) == set(fitting)
    assert found.fitting[0].step_s == min(option.step_s for option in fitting)


def test_fill_leaves_room():
    known = list(splits(preset("llama3-8b"), 8, length=8192, batch_seqs=32, most_tensor=8))
    half = search_of("llama3-8b", fill=0.5, seq_len=8192).best(known, 32)
    assert half.fitting
    assert max(option.total_bytes for option in half.fitting) <= 0.5 * (H100.usable_bytes or 0)


def test_memory_of_our_step_by_hand():
    """llama3-8b, 8.03 B parameters on 8 devices: under ZeRO 1 a bfloat16 copy (2 bytes), float32 sums (4) and one
    microbatch's gradients (2) whole, 12 bytes split; under ZeRO 3 all of them split."""
    n = 8.03e9
    for zero, expected in [(1, 2 + 4 + 2 + 12 / 8), (3, (2 + 4 + 2 + 12) / 8)]:
        setup = Setup(
            model=preset("llama3-8b"), layout=Layout(fsdp=8, zero=zero), seq_len=8192, micro_batch_seqs=1,
            microbatches=4, remat="full", practice=ours("cudnn", Layout(zero=zero)),
        )  # fmt: skip
        found = memory_bytes(setup, held(setup))
        assert found["weights"] + found["gradients"] + found["optimizer"] == pytest.approx(n * expected, rel=0.01)
        assert found["activations"] > 32 * 8192 * 4096 * 2  # inputs of all layers


def test_stage_keeps_what_the_pipeline_says():
    """At most 2 v S - 1 parts, each 1/v of a stage (`transformer.pipeline`), beside the one in work."""

    def at(m, **axes):
        layout = Layout(**axes)
        return in_flight(
            Setup(
                model=preset("llama3-8b"),
                layout=layout,
                seq_len=64,
                micro_batch_seqs=1,
                microbatches=m,
                practice=ours("cudnn", Layout(zero=1)),
            )
        )

    assert at(32, pipeline=4) == 7 + 1
    assert at(4, pipeline=4) == 4 + 1
    assert at(32, pipeline=4, repeats=2) == (15 + 1) / 2


def test_vocabulary_is_split_over_stages():
    """Both tables of llama3-8b, 128,256 x 4,096, in 4 parts; and a quarter of its layers."""
    setup = Setup(
        model=preset("llama3-8b"),
        layout=Layout(pipeline=4),
        seq_len=64,
        micro_batch_seqs=1,
        practice=ours("cudnn", Layout(zero=1)),
    )
    assert sum(held(setup)) == pytest.approx(8.03e9 / 4, rel=0.01)


def test_bubble_is_idle_ticks_over_those_with_work():
    """(S - 1) / (v M) of the stages' work (`transformer.pipeline.Pipeline.bubble`), of a model that is all layers."""
    model = preset("llama3-8b", {"vocab_size": "256"})
    practice = dataclasses.replace(ours("cudnn", Layout(zero=1)), kept_passes=(0, 0))
    for repeats, m in [(1, 8), (2, 8), (1, 32)]:
        layout = Layout(pipeline=4, repeats=repeats)
        setup = Setup(
            model=model, layout=layout, seq_len=8192, micro_batch_seqs=1, microbatches=m, remat="full",
            practice=practice,
        )  # fmt: skip
        found = ClosedForm(H100).forecast(setup)
        work = sum(found.breakdown_s[part] for part in ("matmul", "attention", "elementwise"))
        assert found.breakdown_s["bubble"] / work == pytest.approx(3 / (repeats * m), rel=0.05)


def test_remat_trades_memory_for_time():
    search = search_of("llama3-8b", fill=2.0, seq_len=8192)
    full, dots, none = (search.option(Layout(fsdp=64), 1, 1, remat) for remat in REMATS)
    assert full.total_bytes < dots.total_bytes < none.total_bytes
    assert full.step_s > dots.step_s  # none writes and reads so much that it need not be faster


def option(step_s=1.0, total=10.0, *, n=8, remat="full", limit=100.0, **breakdown) -> Option:
    parts = {"matmul": 0.0, "attention": 0.0} | breakdown
    fits = total <= limit
    return Option(
        n, Layout(data=n), 1, 1, remat, total, limit, Forecast(step_s, parts, {}, {"all": total}) if fits else None
    )


@pytest.mark.parametrize(
    ("loser", "said"),
    [
        (option(total=112e9, limit=75e9), "does not fit: 112 GB"),
        (option(2.0, matmul=0.9, bubble=0.76, tensor=0.1), "bubble 38 %"),
        (option(2.0, matmul=0.9, tensor=0.44, bubble=0.3), "exposed tensor 22 %"),
        (option(2.0, matmul=0.9, fsdp=0.62, bubble=0.3), "exposed fsdp 31 %"),
        (option(2.0, matmul=1.9), "small products 50 %"),
        (option(2.0, matmul=1.5, elementwise=0.5), "small products 30 %"),
        (option(2.0, matmul=1.0, elementwise=1.0), "memory passes 50 %"),
        (option(1.005, matmul=1.0), "as fast"),
    ],
)
def test_reason_is_the_largest_part_that_the_winner_does_without(loser, said):
    assert reason(loser, option(1.0, matmul=0.9, bubble=0.1)) == said


def test_what_is_made_again_is_recomputation():
    winner = option(1.0, remat="none", matmul=0.8, elementwise=0.1)
    assert reason(option(1.5, remat="full", matmul=1.1, elementwise=0.2), winner) == "recomputation 27 %"


def test_front_by_hand():
    points = [(1, 9), (2, 5), (2, 6), (3, 5), (4, 1), (1, 9)]
    assert front(points, lambda p: p[0], lambda p: p[1]) == [(1, 9), (2, 5), (4, 1)]
    options = [option(1.0, 50), option(1.1, 49), option(1.2, 40), option(1.3, 60), option(1.4, 38.1)]
    assert [o.total_bytes for o in lean(options)] == [50, 40]


def priced(days, usd, *, with_failures=None):
    found = {"n_devices": 8, "layout": "", "run_days": days, "run_usd": {"low": 0, "median": usd, "high": usd * 2}}
    if with_failures:
        found |= {"run_days_with_failures": days * with_failures, "run_goodput": 1 / with_failures}
        found |= {"run_usd_with_failures": {"low": 0, "median": usd * with_failures, "high": 0}}
    return found


def test_cheapest_rung_by_hand():
    """40 days for 100, 22 for 110, 15 for 150: each limit takes another."""
    runs = [(8, priced(40, 100)), (16, priced(20, 100, with_failures=1.1)), (32, priced(15, 150))]

    def chosen(**limits):
        limits = {"budget_usd": None, "deadline_days": None} | limits
        found = cheapest([rung(one, option(n=n), **limits) for n, one in runs])
        return found and (found["n_devices"], found["usd"])

    assert chosen() == (8, 100)
    assert chosen(deadline_days=30) == (16, pytest.approx(110))
    assert chosen(deadline_days=21) == (32, 150)  # 20 days without failures are 22 with them
    assert chosen(budget_usd=120) == (8, 100)
    assert chosen(budget_usd=120, deadline_days=21) is None
    late = rung(runs[0][1], option(n=8), budget_usd=None, deadline_days=30)
    assert (late["makes_it"], late["why"]) == (False, "40 days over 30")


def run_of(folder, *argv) -> tuple[int, list]:
    code = plan.main(entry.parse(plan.PlanRequest, [f"--out={folder}", "--simulate=0", *argv]))
    return code, [json.loads(line) for line in (folder / plan.FILE).read_text().splitlines()]


def test_plan_of_a_deadline(tmp_path, capsys):
    """At $2 a device and hour: days are tokens over rate, dollars are device-hours; twice the devices, half the days."""
    argv = ("--preset=gpt2-124m", "--devices=8,16,32", "--batch_tokens=64k", "--tokens=1e12", "--usd_per_device_h=2")
    code, lines = run_of(tmp_path, *argv, "--json")
    said = json.loads(capsys.readouterr().out)
    assert code == 0
    assert {one["n_devices"] for one in lines} == {8, 16, 32}
    assert all(one["fits"] for one in lines)
    for one, best in zip(said["rungs"], said["best"], strict=True):
        days = 1e12 / 65_536 * best["step_s"] / 86_400 / one["goodput"]
        assert one["days"] == pytest.approx(days)
        assert one["usd"] == pytest.approx(days * 24 * 2 * one["n_devices"], rel=0.2)  # and spare nodes
        assert best["step_s"] == min(line["step_s"] for line in lines if line["n_devices"] == one["n_devices"])
    usd = [one["usd"] for one in said["rungs"]]
    assert said["chosen"]["usd"] == min(usd)
    between = (said["rungs"][1]["days"] + said["rungs"][2]["days"]) / 2
    run_of(tmp_path, *argv, f"--deadline_days={between}", "--json")
    assert json.loads(capsys.readouterr().out)["chosen"]["n_devices"] == 32


def test_winning_line_is_a_request_of_the_same_rung(tmp_path, capsys):
    from experiments.forecast.__main__ import ForecastRequest

    run_of(tmp_path, "--preset=llama3-8b", "--devices=16", "--batch_tokens=2M", "--seq_len=8192", "--json")
    said = json.loads(capsys.readouterr().out)
    (best,) = said["best"]
    command = best["command"].split()
    assert command[:3] == ["python", "-m", "experiments.forecast"]
    request = entry.parse(ForecastRequest, command[3:])
    rung_ = request.rung(16)
    assert (str(rung_.layout), rung_.micro_batch_seqs, rung_.microbatches, request.remat) == tuple(
        best[key] for key in ("layout", "micro_batch_seqs", "microbatches", "remat")
    )
    assert rung_.global_batch_seqs * request.length == 2 * 1024**2
    assert (request.device, request.devices) == ("h100-sxm", (16,))


def test_nothing_that_fits_is_a_verdict(tmp_path, capsys):
    code, lines = run_of(tmp_path, "--preset=llama3-405b", "--devices=8", "--batch_tokens=1M")
    out = capsys.readouterr().out
    assert (code, lines) == (0, [])
    assert "nothing fits on 8 devices" in out
    assert "does not fit: " in out


def test_layout_beside_is_shown_at_its_best(tmp_path, capsys):
    argv = ("--preset=llama3-8b", "--devices=16", "--batch_tokens=1M", "--seq_len=8192")
    run_of(tmp_path, *argv, "--beside=pipeline=2,tensor=8", "--json")
    (beside,) = json.loads(capsys.readouterr().out)["beside"]
    assert beside["layout"] == "pipeline=2,tensor=8"
    assert (beside["micro_batch_seqs"] * beside["microbatches"]) == 128
    assert "exposed" in beside["why"] or "bubble" in beside["why"]


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        ("--devices=8", ("--batch_tokens=", "such as 16777216 or 16M")),
        ("--batch_tokens=16m", ("--batch_tokens=16m", "16777216 or 16M")),
        ("--batch_tokens=100 --seq_len=64", ("100 tokens, not whole sequences of 64", "nearest: 128")),
        ("--batch_tokens=64k --devices=7", ("--devices=7", "no layout")),
        ("--batch_tokens=64k --devices=0", ("--devices=0", "expected counts")),
        ("--batch_tokens=64k --simulate=-1", ("--simulate=-1", "expected 0 or more")),
        ("--batch_tokens=64k --fill=1.5", ("--fill=1.5", "at most 1")),
        ("--batch_tokens=64k --budget_usd=1e6", ("--budget_usd", "--tokens")),
        ("--batch_tokens=64k --tokens=-1", ("--tokens=-1", "above 0")),
        ("--batch_tokens=64k --preset=tinny", ("'tinny'", "did you mean 'tiny'")),
        ("--batch_tokens=64k --device=h100-sxn", ("'h100-sxn'", "did you mean 'h100-sxm'")),
        ("--batch_tokens=64k --beside=tensr=8", ("'tensr'", "did you mean 'tensor'")),
        (
            "--batch_tokens=64k --beside=pipeline=16 --devices=16",
            ("pipeline=16 does not divide", "nearest: pipeline=12"),
        ),
        ("--batch_tokens=64k --precision=int8 --device=tpu-v7", ("--precision=int8", "bf16")),
        ("--batch_tokens=64k --out=FILE", ("--out=", "expected a folder")),
    ],
)
def test_wrong_request_is_refused_in_one_line(tmp_path, argv, fragments):
    (tmp_path / "file").write_text("")
    words = [f"--out={tmp_path}/out", "--simulate=0", *argv.replace("FILE", str(tmp_path / "file")).split()]
    with pytest.raises(RequestError) as caught:
        plan.main(entry.parse(plan.PlanRequest, words))
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path(tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "length", "expected"),
    [("16M", 8192, 2048), ("16777216", 8192, 2048), ("60M", 4096, 15_360), ("1.5k", 512, 3), ("1B", 4096, 2**18)],
)
def test_suffixes_are_powers_of_1024(text, length, expected):
    """Llama 3's 16M are 2,048 sequences of 8,192; DeepSeek V3's 15,360 of 4,096 are 60M."""
    assert plan.sequences(text, length) == expected


def test_winner_is_the_fastest_that_was_simulated_and_fits():
    first, second, third, fourth = (option(1 + i / 10, 10 + i) for i in range(4))
    told = Plan(8, Found([first, second, third, fourth], {}, 12))
    assert (told.winner, told.why(first)) == (first, "the best")
    told.simulated = {
        first: {"failed": None, "fits": False, "memory_bytes": {"total": 90e9}, "step_s": {"median": 1.0}},
        second: {"failed": None, "fits": True, "step_s": {"median": 2.0}},
        third: {"failed": None, "fits": True, "step_s": {"median": 1.6}},
    }
    assert told.winner == third
    assert told.why(first) == "does not fit when compiled: 90 GB"
    assert told.why(second) == "simulated +25 %"
    told.simulated = {first: told.simulated[first]}
    assert told.winner == second  # in closed form


def test_best_are_compiled_and_simulated(tmp_path, capsys):
    argv = ["--model.n_layers=1", "--devices=2", "--batch_tokens=4k", f"--out={tmp_path}", "--simulate=1", "--json"]
    assert plan.main(entry.parse(plan.PlanRequest, argv)) == 0
    said = json.loads(capsys.readouterr().out)
    (kept,) = records.read(tmp_path)
    assert kept["method"] == "simulated"
    (best,) = said["best"]
    assert best["simulated_step_s"] == kept["step_s"]["median"]
    assert best["simulated_memory_bytes"] == kept["memory_bytes"]["total"]
    assert kept["global_batch_seqs"] * kept["seq_len"] == 4 * 1024
