"""The report: curves checked by hand, nothing dropped, nothing fetched, nothing half written."""

import csv
import html.parser
import io
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from experiments import cost, entry, hardware, records
from experiments.report import __main__ as report
from experiments.report import bars, curves, headline, lines, tables, text, words
from experiments.report.figure import device_axis
from transformer.errors import RequestError

OUTPUTS = ("report.html", "report.md", "records.csv")


def record(kind="measured", preset="tiny", device="cpu", n_devices=1, step_s=1.0, seqs=4, **changed):
    """A plausible record of schema 1; `changed` replaces keys, and its `layout` adds to one that is all data."""
    seq_len, n = changed.get("seq_len", 512), n_devices
    layout = {"data": n, "fsdp": 1, "tensor": 1, "microbatches": 1, "remat": "none", "precision": "bf16"}
    layout |= {"attention": "cudnn"} | changed.pop("layout", {})
    rate = seqs * seq_len / step_s
    made = {
        "schema": 1,
        "kind": kind,
        "preset": preset,
        "model": {"n_layers": 8, "d_model": 64},
        "config": {"micro_batch_seqs": 4, "global_batch_seqs": seqs if changed.get("scaling") == "strong" else None},
        "device": device,
        "n_devices": n,
        "layout": layout,
        "scaling": "weak",
        "global_batch_seqs": seqs,
        "seq_len": seq_len,
        "step_s": {"median": step_s, "low": 0.96 * step_s, "high": 1.1 * step_s},
        "tokens_per_s": rate,
        "tokens_per_s_per_device": rate / n,
        "mfu": {"full": 0.45, "causal": 0.42},
        "hfu": 0.5,
        "memory_bytes": {"parameters": 17e9, "optimizer": 24e9, "activations": 21e9, "total": 62e9, "limit": 80e9},
        "fits": True,
        "energy_j": None,
        "failed": None,
        "versions": {"jax": "0.10.2", "python": "3.11.9"},
        "commit": "286de52",
        "command": "python -m experiments.ladder --preset=tiny",
        "created": "2025-11-23T12:00:00Z",
    }
    if kind == "measured":
        made["step_s"]["all"] = [0.96 * step_s, step_s, 1.1 * step_s]
        made |= {"device_kind": "cpu", "mfu": None, "hfu": None, "memory_bytes": None, "fits": None}
    else:
        made |= {
            "method": "simulated",
            "compiled_for": device,
            "breakdown_s": {
                "matmul": 0.6 * step_s,
                "attention": 0.15 * step_s,
                "exposed fsdp": 0.2 * step_s,
                "host": 0.05 * step_s,
            },
            "hidden_s": {"fsdp": 0.3 * step_s},
            "facts": {
                "peak_bf16_flops_per_s": {"value": 989.4e12, "source": "NVIDIA H100 datasheet", "date": "2025-01"}
            },
            "assumed": {"host_s": 0.0, "kernels": "not autotuned"},
        }
    return made | changed


def failed(reason, **told):
    """A rung that did not run: it has no numbers."""
    numbers = ("step_s", "tokens_per_s", "tokens_per_s_per_device", "mfu", "hfu", "memory_bytes", "fits", "breakdown_s")
    return {k: v for k, v in record(**told).items() if k not in numbers} | {"failed": reason}


def compose():
    """Measured CPU rungs of both scalings, and H100 forecasts up to 40,960, with one failure and one misfit."""
    note = "8 virtual devices share 2 cores"
    found = [record(n_devices=n, seqs=4 * n, step_s=s, note=note) for n, s in ((1, 0.5), (2, 0.9), (4, 1.7), (8, 3.3))]
    found += [record(n_devices=n, seqs=8, step_s=1.0 + 0.1 * n, scaling="strong", note=note) for n in (1, 2, 4, 8)]
    found += [record("forecast", n_devices=n, seqs=4 * n, step_s=s) for n, s in ((4, 1.53), (8, 3.63))]
    big = {"kind": "forecast", "preset": "llama3-70b", "device": "h100-sxm", "seq_len": 8192}
    for n, step_s in ((64, 8.1), (512, 8.3), (1024, 8.4), (8192, 9.0), (40960, 10.4)):
        layout = {"data": n // 64, "fsdp": 8, "tensor": 8, "remat": "full"}
        found.append(record(**big, n_devices=n, seqs=n // 2, step_s=step_s, layout=layout))
    for n, step_s in ((64, 33.0), (512, 4.4), (1024, 2.4)):
        layout = {"data": n // 64, "fsdp": 8, "tensor": 8, "remat": "full"}
        found.append(record(**big, n_devices=n, seqs=256, step_s=step_s, layout=layout, scaling="strong"))
    reason = "global batch of 256 sequences over 512 data shards: the largest count that works is 2048"
    found.append(
        failed(
            reason,
            **big,
            n_devices=4096,
            seqs=256,
            layout={"data": 64, "fsdp": 8, "tensor": 8, "remat": "full"},
            scaling="strong",
        )
    )
    memory = {"parameters": 35e9, "optimizer": 52e9, "activations": 31e9, "total": 118e9, "limit": 80e9}
    layout = {"data": 1, "fsdp": 4, "tensor": 8, "remat": "full"}
    found.append(record(**big, n_devices=32, seqs=16, step_s=8.0, layout=layout, memory_bytes=memory, fits=False))
    return found


def write(folder: Path, found):
    for one in found:
        records.append(folder, one)
    return folder


def rungs_of(found, tokens=None):
    """The frame at USD 3 per device and hour."""
    return curves.frame(found, cost.rows(found, hardware.load(), tokens=tokens, usd_per_device_h=3.0))


def run(folder, *flags):
    report.main(entry.parse(report.Request, [str(folder), *flags]))


# --- curves, by hand ---


def test_efficiency_is_per_device_throughput_against_the_smallest_rung():
    """2048 tokens per device and step: 1.0 s, 1.25 s and 2.0 s are 2048, 1638.4 and 1024 tokens/s/device."""
    found = [record(n_devices=n, seqs=4 * n, step_s=s) for n, s in ((4, 1.25), (2, 1.0), (8, 2.0))]
    rungs = rungs_of(found)
    assert list(rungs["efficiency"]) == pytest.approx([0.8, 1.0, 0.5])
    assert set(rungs["base_devices"]) == {2}


def test_weak_and_strong_and_measured_and_forecast_never_share_a_curve():
    along = curves.points(rungs_of(compose()))
    for column in ("scaling", "kind", "preset", "device", "seq_len", "precision"):
        assert set(along.groupby("curve")[column].nunique()) == {1}, column


@pytest.mark.parametrize(
    ("column", "other"),
    [
        ("scaling", {"scaling": "strong"}),
        ("seq_len", {"seq_len": 1024}),
        ("precision", {"layout": {"precision": "fp8"}}),
        ("family", {"layout": {"data": 1, "fsdp": 4}}),
        ("model", {"model": {"n_layers": 12, "d_model": 64}}),
        ("micro batch", {"config": {"micro_batch_seqs": 8}}),
    ],
)
def test_what_differs_makes_another_curve_with_another_name(column, other):
    found = [record(n_devices=2), record(n_devices=4), record(n_devices=4) | record(n_devices=4, **other)]
    assert curves.points(rungs_of(found))["curve"].nunique() == 2, column


def test_data_takes_what_is_left_so_it_makes_no_family():
    found = [record(n_devices=8 * d, layout={"data": d, "fsdp": 8}) for d in (1, 2, 16)]
    assert curves.points(rungs_of(found))["curve"].nunique() == 1


def test_one_device_opens_every_curve_of_its_ladder():
    found = [record(), record(n_devices=4, step_s=2.0), record(n_devices=4, step_s=4.0, layout={"data": 1, "fsdp": 4})]
    rungs = rungs_of(found)
    assert rungs["families"].tolist() == [["data", "fsdp"], ["data"], ["fsdp"]]
    assert list(rungs["efficiency"]) == pytest.approx([1.0, 0.125, 0.0625])


def test_line_runs_through_the_best_of_several_layouts_and_the_others_are_marked():
    found = [
        record(n_devices=2),
        *(record(n_devices=4, step_s=s, layout={"microbatches": m}) for s, m in ((2.0, 1), (1.0, 2))),
    ]
    along = curves.points(rungs_of(found))
    assert dict(zip(along["step_s"], along["best"], strict=True)) == {1.0: True, 2.0: False}
    traces = lines.figures(along, None)[0].views[0].traces
    assert [(trace.mode, len(trace.x)) for trace in traces] == [("lines+markers", 2), ("markers", 1)]


def test_forecast_error_is_over_the_measured_step():
    """1.53 s for 1.70 s is 10 % too fast, 3.63 s for 3.30 s is 10 % too slow."""
    both = curves.pairs(rungs_of(compose()))
    assert dict(zip(both["n_devices"], both["error"].round(6), strict=True)) == {4: -0.1, 8: 0.1}


def test_rung_that_does_not_run_is_on_no_curve_and_sets_no_base():
    found = [record("forecast", n_devices=n, step_s=s, fits=f) for n, s, f in ((2, 0.1, False), (4, 1.0, True))]
    rungs = rungs_of(found)
    assert pd.isna(rungs["efficiency"][0])
    assert rungs["efficiency"][1] == 1.0
    assert rungs["verdict"][0] == "does not fit: 62.0 GB per device, limit 80.0 GB"
    throughput = lines.figures(curves.points(rungs), None)[0].views[0].traces
    assert [list(trace.x) for trace in throughput] == [[4], [2]]
    assert throughput[1].name.startswith("failed or does not fit")


# --- figures ---


def test_measured_is_filled_and_solid_and_forecast_hollow_and_dashed():
    for figure in lines.figures(curves.points(rungs_of(compose(), 3e11)), 3e11):
        for view in figure.views:
            for trace in view.traces:
                if trace.name and trace.name.startswith("measured"):
                    assert (trace.line.dash, trace.marker.color) == ("solid", trace.line.color)
                elif trace.name and trace.name.startswith("forecast"):
                    assert (trace.line.dash, trace.marker.color) == ("dash", "white")


def test_note_of_a_measurement_stands_with_its_curve():
    traces = lines.figures(curves.points(rungs_of(compose())), None)[0].views[0].traces
    assert any("8 virtual devices share 2 cores" in trace.name for trace in traces)


def test_breakdown_adds_up_and_what_is_hidden_has_an_axis_of_its_own():
    figure = {f.anchor: f for f in bars.figures(curves.points(rungs_of(compose())))}["breakdown"]
    traces = figure.views[0].traces
    added = [sum(ys) for ys in zip(*(t.y for t in traces if t.yaxis != "y2"), strict=True)]
    assert added == pytest.approx([8.0, 8.1, 8.3, 8.4, 9.0, 10.4])
    assert [t.name for t in traces if t.yaxis == "y2"] == ["hidden: fsdp"]


def test_memory_is_stacked_by_class_under_the_limit():
    figure = {f.anchor: f for f in bars.figures(curves.points(rungs_of(compose())))}["memory"]
    shown = {trace.name: trace.y[0] for trace in figure.views[0].traces}
    assert shown == pytest.approx({"parameters": 35, "optimizer": 52, "activations": 31, "limit 80.0 GB": 80})


def test_ticks_are_counts_that_occur_and_never_crowd():
    axis = device_axis(pd.Series([64, 1024, 8192, 40960]))
    assert axis["ticktext"] == ["64", "1k", "8k", "41k"]
    crowded = device_axis(pd.Series(range(1, 1000)))
    assert len(crowded["tickvals"]) <= 18
    assert (crowded["tickvals"][0], crowded["tickvals"][-1]) == (1, 999)


def test_spread_of_a_cost_is_the_spread_of_the_price():
    """A million tokens at 2048 a second take 488.28125 s, and USD 3.6 an hour is 0.001 a second; then half, twice."""
    row = {"usd_per_device_h": {"low": 1.8, "median": 3.6, "high": 7.2}, "usd_per_h": 3.6, "usd_per_mtok": 0.48828125}
    rung = curves.frame([record()], [row]).iloc[0]
    assert list(rung[["usd_per_mtok_low", "usd_per_mtok", "usd_per_mtok_high"]]) == [0.244140625, 0.48828125, 0.9765625]


# --- headline and tables ---


def test_headline_is_the_largest_rung_that_runs_and_says_its_kind():
    card = headline.cards(rungs_of(compose(), 3e11), 3e11)[0]
    assert (card.kind, card.title) == ("forecast", f"40,960 {words.TIMES} h100-sxm")
    said = {label: value for label, value, _ in card.numbers}
    # 20480 sequences of 8192 tokens in 10.4 s; 40960 devices at USD 3
    assert said["Step time"] == "10.4 s"
    assert said["Tokens per day"] == "1.39 T"
    assert said["USD per hour"] == "USD 122,880"
    assert said["USD per run"] == "USD 634,766"
    assert said["MFU"] == "45.0 %"


def test_tables_keep_kinds_apart_and_drop_no_rung():
    found = compose()
    made = {table.title: table for table in tables.tables(rungs_of(found), found, None)}
    assert (len(made["Speed, measured"].rows), len(made["Speed, forecast"].rows)) == (8, 10)
    reasons = [row[3] for row in made["Rungs that do not run"].rows]
    assert len(reasons) == 2
    assert "largest count that works is 2048" in reasons[0]
    assert "118.0 GB per device, limit 80.0 GB" in reasons[1]
    assert made["Facts"].rows[0] == [
        "cpu",
        "peak_bf16_flops_per_s",
        "9.894e+14",
        "NVIDIA H100 datasheet, 2025-01",
    ]
    assert made["Assumed"].rows[1] == ["cpu", "kernels", "not autotuned"]
    assert [row[:2] + row[-1:] for row in made["Provenance"].rows] == [
        ["measured", "run on cpu", "8"],
        ["forecast", "simulated, compiled for cpu", "2"],
        ["forecast", "simulated, compiled for h100-sxm", "10"],
    ]


def test_records_survive_the_csv():
    found = compose()
    rows = list(csv.DictReader(io.StringIO(text.csv(found))))
    assert len(rows) == len(found)
    for row, one in zip(rows, found, strict=True):
        assert float(row["n_devices"]) == one["n_devices"]
        assert row["layout.precision"] == one["layout"]["precision"]
        assert (float(row["step_s.median"]) if row["step_s.median"] else None) == one.get("step_s", {}).get("median")
        assert (json.loads(row["step_s.all"]) if row["step_s.all"] else None) == one.get("step_s", {}).get("all")
        assert row["failed"] == (one["failed"] or "")


# --- the verb ---


class _Attributes(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.scripts = [], 0

    def handle_starttag(self, tag, attrs):
        self.found += [(tag, name, value) for name, value in attrs if name in ("src", "href", "srcset", "action")]
        self.scripts += tag == "script"


def test_page_refers_to_nothing_outside_itself(tmp_path):
    run(write(tmp_path, compose()), "--tokens=300e9")
    page = (tmp_path / "report.html").read_text()
    attributes = _Attributes()
    attributes.feed(page)
    assert attributes.found == []
    assert attributes.scripts == 3
    assert page.count("plotly.js v") == 1
    assert "@import" not in page.split("</style>")[0]
    assert "url(" not in page.split("</style>")[0]


def test_what_a_record_says_is_text_never_markup(tmp_path):
    evil = "<script>alert(1)</script>"
    found = [record(preset=evil, note=evil, command=evil), failed(evil, preset=evil, n_devices=2)]
    run(write(tmp_path, found))
    assert "<script>alert" not in (tmp_path / "report.html").read_text()
    assert "<script>" not in (tmp_path / "report.md").read_text().replace("\\<", "")


def test_same_records_give_the_same_report(tmp_path):
    written = []
    for name in ("one", "two"):
        run(write(tmp_path / name, compose()))
        written.append([(tmp_path / name / output).read_text() for output in OUTPUTS])
    assert written[0] == written[1]


def test_corrupt_record_is_refused_and_no_file_changes(tmp_path):
    run(write(tmp_path, compose()))
    before = {name: (tmp_path / name).read_bytes() for name in OUTPUTS}
    with open(tmp_path / records.FILE, "a") as file:
        file.write('{"schema": 1, "kind": "meas\n')
    with pytest.raises(RequestError, match=r"records\.jsonl:\d+: not a JSON object"):
        run(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in OUTPUTS} == before


@pytest.mark.parametrize("content", [None, "", "\n\n"])
def test_folder_without_a_record_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / records.FILE).write_text(content)
    with pytest.raises(RequestError, match=r"records\.jsonl"):
        run(tmp_path)
    assert not any((tmp_path / name).exists() for name in OUTPUTS)


@pytest.mark.parametrize("tokens", ["0", "-1", "nan", "inf"])
def test_run_of_no_tokens_is_refused(tmp_path, tokens):
    with pytest.raises(RequestError, match="--tokens"):
        entry.parse(report.Request, [str(tmp_path), f"--tokens={tokens}"])


def test_only_failed_rungs_still_make_a_page(tmp_path):
    run(write(tmp_path, [failed("out of memory", n_devices=8)]))
    assert "out of memory" in (tmp_path / "report.html").read_text()


def test_device_without_facts_has_no_price_but_a_curve(tmp_path):
    run(write(tmp_path, [record(device="Tesla K80", n_devices=n) for n in (1, 2)]))
    page = (tmp_path / "report.html").read_text()
    assert "measured \\u00b7 tiny \\u00b7 Tesla K80" in page
    assert "no facts about device &#x27;Tesla K80&#x27;" in page


def test_json_is_alone_on_standard_output(tmp_path, capsys):
    run(write(tmp_path, compose()), "--json")
    out, err = capsys.readouterr()
    assert len(json.loads(out)) == len(compose())
    assert str(tmp_path / "report.html") in err.replace("\n", "")


def test_report_imports_no_jax():
    code = "import sys, experiments.report.__main__; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
