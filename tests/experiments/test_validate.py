"""Published rows, read and forecast: what their free text says, what is assumed, how errors are counted."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import entry, validate
from experiments.hardware import load
from experiments.validation import score, words
from experiments.validation.conventions import flops_per_token
from experiments.validation.frameworks import practice_of
from experiments.validation.models import Excused, model_of
from experiments.validation.rows import case_of, measured_step_s
from experiments.validation.tables import Row
from transformer.errors import RequestError
from transformer.presets import preset

FACTS = load()

KORTHIKANTI_22B = {
    "source_id": "korthikanti2022", "source_ref": "arXiv:2205.05198 table 5", "year": "2022", "model_name": "gpt-22B",
    "layers": "48", "d_model": "6144", "n_heads": "64", "n_kv_heads": "64", "d_ff": "24576", "vocab": "51200",
    "ffn_type": "mlp", "seq_len": "2048", "device": "A100-80G-SXM", "n_devices": "8", "devices_per_node": "8",
    "interconnect": "NVLink3 + 8x200Gb HDR IB per node (Selene)", "dp": "1", "fsdp_zero_stage": "0", "tp": "8",
    "pp": "1", "vpp": "1", "cp": "1", "ep": "1", "sp": "no", "global_batch_seqs": "4", "micro_batch": "4",
    "precision": "fp16", "remat": "full", "software": "Megatron-LM 2022", "step_time_s": "1.42",
}  # fmt: skip
"""arXiv:2205.05198, tables 3 and 5."""

MEGATRON_76B = KORTHIKANTI_22B | {
    "source_id": "megatron2021", "model_name": "gpt-76B", "layers": "60", "d_model": "10240", "n_heads": "80",
    "n_kv_heads": "80", "d_ff": "40960", "n_devices": "1024", "dp": "32", "pp": "4", "vpp": "3",
    "global_batch_seqs": "1792", "micro_batch": "2", "software": "Megatron-LM 2021-04", "step_time_s": "16.0087",
}  # fmt: skip
"""arXiv:2104.04473, table 1: 140 TFLOP/s a GPU."""


def row(**changed) -> Row:
    return Row(KORTHIKANTI_22B | changed, "table.csv, line 2")


def table(path: Path, rows: list[dict[str, str]]) -> str:
    columns = list(dict.fromkeys(key for cells in rows for key in cells))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


@pytest.mark.parametrize(
    ("text", "zero", "size"),
    [
        ("0", 0, None), ("1", 1, None), ("3", 3, None), ("ZeRO-2", 2, None), ("zero stage 3", 3, None),
        ("distributed optimizer (ZeRO-1)", 1, None), ("1 (distributed optimizer)", 1, None), ("FSDP", 3, None),
        ("FSDP-64 in slice", 3, 64), ("FSDP2-8", 3, 8), ("FSDP FULL_SHARD", 3, None), ("HSDP", 3, None),
        ("FSDP SHARD_GRAD_OP", 2, None), ("mesh [1,16,2]", 3, 16), ("DDP", 0, None), ("distributed fused adam", 1, None),
        ("FSDP: optimizer+grad sharded, weights not resharded after forward", 2, None),
    ],
)  # fmt: skip
def test_sharding_is_read(text, zero, size):
    found = words.sharding(text)
    assert found is not None
    assert (found.zero, found.size) == (zero, size)


@pytest.mark.parametrize(
    ("text", "kind", "share"),
    [
        ("none", "none", 1), ("full", "full", 1), ("selective", "selective", 1), ("selective(per-op)", "selective", 1),
        ("minimal", "none", 1), ("minimal_flash", "none", 1), ("full-ish (rematerialisation)", "full", 1), ("off", "none", 1),
        ("full, every 2nd layer", "full", 0.5), ("full (50 % of layers)", "full", 0.5), ("block", "full", 1),
        ("selective (RMSNorm, MLA up-proj)", "selective", 1), ("activation checkpointing", "full", 1),
    ],
)  # fmt: skip
def test_recomputation_is_read(text, kind, share):
    assert words.recompute(text) == words.Recompute(kind, share)


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        ("bf16", "bf16"), ("fp16", "fp16"), ("amp_bf16 DEFAULT", "bf16"), ("bf16 PURE", "bf16"), ("fp8 linear", "fp8"),
        ("amp_fp8 DEFAULT", "fp8"), ("bf16 (Transformer Engine)", "bf16"), ("fp16/bf16 mixed (not stated which)", "bf16"),
        ("fp8 linear + fp8 all-gather", "fp8"), ("MXFP8", "fp8"), ("fp32", "f32"), ("int8 (AQT)", "int8"), ("TF32", "f32"),
    ],
)  # fmt: skip
def test_precision_is_read(text, precision):
    found = words.precision(text)
    assert found is not None
    assert found.precision == precision


@pytest.mark.parametrize("read", [words.sharding, words.recompute, words.precision])
@pytest.mark.parametrize("text", ["", "   ", "?", "lorem ipsum", "n/a"])
def test_what_says_nothing_is_nothing(read, text):
    assert read(text) is None


@pytest.mark.parametrize(
    ("text", "per_node", "gbit_per_device"),
    [
        ("NVLink3 + 8x200Gb HDR IB per node (Selene)", 8, 200), ("NVLink2 + 4x100Gb Omni-Path per node", 4, 100),
        ("1600 Gb/s per node RoCE", 8, 200), ("NVLink + 400 Gb/s RDMA per GPU", 8, 400), ("400 Gb/s per node", 8, 50),
        ("NVLink4 + 400Gb/s RoCE per GPU, 3-layer Clos", 8, 400), ("EFA 3200 Gbps per node", 8, 400), ("NVSwitch", 8, None),
    ],
)  # fmt: skip
def test_network_is_read(text, per_node, gbit_per_device):
    found = words.nic_bytes_per_s(text, per_node)
    assert found == (None if gbit_per_device is None else pytest.approx(gbit_per_device / 8 * 1e9))


@pytest.mark.parametrize(
    ("software", "year", "platform", "name", "attention"),
    [
        ("Megatron-LM 2020-09", 2020, "gpu", "megatron-2020", "unfused"),
        ("Megatron-LM 2021-04", 2021, "gpu", "megatron-2021", "unfused"),
        ("Megatron-LM core 0.9, TE 1.11", 2025, "gpu", "megatron-core", "best"),
        ("NeMo 25.02", 2025, "gpu", "nemo", "best"), ("NeMo 24.03", 2025, "gpu", "nemo", "flash2"),
        ("Megatron-DeepSpeed", 2022, "gpu", "megatron-deepspeed", "unfused"),
        ("torchtitan 2025-06 compile", 2025, "gpu", "fsdp", "flash2"), ("MosaicML Composer FSDP", 2023, "gpu", "fsdp", "flash1"),
        ("MaxText (JAX)", 2023, "tpu", "xla", "unfused"), ("MaxText (JAX)", 2025, "tpu", "xla", "best"),
        ("an unknown framework", 2025, "gpu", "megatron-core", "best"), ("", None, "tpu", "xla", "best"),
    ],
)  # fmt: skip
def test_practice_is_told_from_the_software(software, year, platform, name, attention):
    practice, _ = practice_of(software, "", year, platform, words.Number("bf16"))
    assert (practice.name, practice.attention) == (name, attention)


def test_overlap_that_a_source_turns_off_is_off():
    said = practice_of("NeMo 25.04, no comm overlap", "", 2025, "gpu", words.Number("bf16"))[0]
    assert not said.data_overlap
    assert said.tensor_overlap == 0
    assert practice_of("torchtitan compile AsyncTP", "", 2025, "gpu", words.Number("bf16"))[0].tensor_overlap > 0.3


def test_printed_row_is_taken_as_it_stands():
    case = case_of(row(), FACTS)
    (setup,) = case.choices
    assert str(setup.layout) == "tensor=8"
    assert (setup.micro_batch_seqs, setup.microbatches, setup.remat, setup.precision) == (4, 1, "full", "fp16")
    assert not setup.sequence_parallel
    assert case.device.nic_bytes_per_s == 25e9
    assert case.assumed == ()
    jean_zay = row(interconnect="NVLink2 + 4x100Gb Omni-Path per node", devices_per_node="4", device="V100-32G-SXM2")
    device = case_of(jean_zay, FACTS).device
    assert (device.nic_bytes_per_s, device.scaleup_devices) == (12.5e9, 4)


def test_what_is_blank_is_assumed_and_said():
    blank = dict.fromkeys(("micro_batch", "remat", "precision", "fsdp_zero_stage", "vocab", "d_ff"), "")
    case = case_of(row(**blank), FACTS)
    said = " ".join(case.assumed)
    for name in ("micro_batch", "remat", "precision", "zero", "vocab", "d_ff"):
        assert name in said
    assert {s.micro_batch_seqs for s in case.choices} == {1, 2, 4}
    assert {s.remat for s in case.choices} == {"none", "selective", "full"}


def test_what_is_not_understood_is_said():
    said = case_of(row(remat="quasi", fsdp_zero_stage="magic"), FACTS).assumed
    assert any("'quasi' is not understood" in line for line in said)
    assert any("'magic' is not understood" in line for line in said)


def test_layout_of_replicas_and_slices():
    jax = {"software": "MaxText (JAX)", "year": "2024", "device": "TPUv5e", "n_devices": "512", "dp": "2", "tp": "1",
           "fsdp_zero_stage": "FSDP-256 in slice", "global_batch_seqs": "3072", "micro_batch": "6", "devices_per_node": "8",
           "interconnect": "ICI 2D torus 16x16 within 256-chip slice; 2 slice(s) over DCN data parallel"}  # fmt: skip
    assert str(case_of(row(**jax), FACTS).choices[0].layout) == "slice=2,fsdp=256"
    mixture = {"software": "NeMo 25.02", "year": "2025", "model_name": "mixtral-8x7b", "layers": "32", "d_model": "4096",
               "n_heads": "32", "n_kv_heads": "8", "d_ff": "14336", "ffn_type": "moe-swiglu", "moe_experts": "8",
               "moe_topk": "2", "device": "H100", "n_devices": "64", "dp": "16", "tp": "1", "pp": "4", "vpp": "8",
               "ep": "8", "fsdp_zero_stage": "1", "global_batch_seqs": "256", "micro_batch": "1"}  # fmt: skip
    assert str(case_of(row(**mixture), FACTS).choices[0].layout) == "pipeline=4,fsdp=2,expert=8,zero=1,repeats=8"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"device": "Cerebras WSE-3"}, "no facts about device 'Cerebras WSE-3'"), ({"layers": ""}, "no layers"),
        ({"ffn_type": "mamba2"}, "'mamba' is a layer that is not built here"), ({"seq_len": ""}, "no seq_len"),
    ],
)  # fmt: skip
def test_row_is_excused_for_its_reason_alone(changed, reason):
    with pytest.raises(Excused, match=reason):
        case_of(row(**changed), FACTS)


def test_sizes_that_do_not_multiply_to_the_devices_give_way_and_it_is_said():
    case = case_of(row(tp="8", pp="3", dp="5", n_devices="64", global_batch_seqs="64", micro_batch="1"), FACTS)
    assert str(case.choices[0].layout) == "data=8,tensor=8"
    said = " ".join(case.assumed)
    assert "8x3x1 does not divide 64 devices" in said
    assert "dp=8" in said


@pytest.mark.parametrize("spelling", ["NVIDIA H100 80GB HBM3 (Eos)", "H100-SXM5", "8xH100-80G-SXM nodes"])
def test_device_is_found_within_its_text(spelling):
    assert case_of(row(device=spelling), FACTS).device.slug == "h100-sxm"


def test_dims_that_no_column_prints_are_the_published_models():
    deepseek = {"model_name": "DeepSeek V3 (4 layers)", "layers": "4", "d_model": "7168", "n_heads": "128",
                "n_kv_heads": "128", "d_ff": "2048", "vocab": "129280", "ffn_type": "moe-swiglu", "moe_experts": "256",
                "moe_topk": "8", "seq_len": "4096"}  # fmt: skip
    model, _ = model_of(row(**deepseek))
    assert (model.kv_rank, model.d_head, model.expert_size, model.d_ff) == (512, 192, 2048, 18_432)
    assert (model.n_dense_layers, model.n_shared_experts) == (1, 1)
    gpt, _ = model_of(row())
    assert (gpt.d_head, gpt.gated, gpt.kv_rank) == (96, False, None)


def test_flops_by_convention():
    """Narayanan et al. 2021, eq. 3: 96 B s l h^2 (1 + s/6h + V/16lh), which counts the layers' forward pass twice."""
    config, s = preset("megatron-76b"), 2048
    h, layers, v = config.d_model, config.n_layers, config.vocab_size
    printed = 96 * layers * h**2 * (1 + s / 6 / h + v / 16 / layers / h)
    assert flops_per_token(config, s, "hardware flops with full recompute") == pytest.approx(printed, rel=1e-3)
    assert flops_per_token(config, s, "model flops") == pytest.approx(
        72 * layers * h**2 * (1 + s / 6 / h + v / 12 / layers / h), rel=1e-3
    )
    causal = flops_per_token(config, s, "model flops (causal-halved attention)")
    assert flops_per_token(config, s, "") - causal == pytest.approx(6 * layers * s * h)
    assert flops_per_token(config, s, "6N only") < causal


def test_step_time_comes_from_what_is_printed():
    """Table 1 of arXiv:2104.04473 prints 140 TFLOP/s; 4.3 GB of batch FLOPs over 1,024 GPUs make 16.0 s of it."""
    cells = MEGATRON_76B | {
        "step_time_s": "",
        "tflops_per_device": "140.43",
        "flops_count": "hardware flops, recompute",
    }
    printed = Row(cells, "t.csv, line 2")
    flops = flops_per_token(preset("megatron-76b"), 2048, cells["flops_count"]) * 1792 * 2048
    step_s, by = measured_step_s(printed, lambda said: flops, 312e12)
    assert (round(step_s or 0, 2), by) == (16.01, "tflops_per_device")
    rate = Row(cells | {"tokens_per_s_per_device": "1000"}, "t.csv, line 2")
    assert measured_step_s(rate, lambda said: flops, None)[0] == pytest.approx(1792 * 2048 / 1000 / 1024)


def test_scores_by_hand():
    rows = [
        {"step_s": 1.1, "error": 0.1, "fits": True}, {"step_s": 0.8, "error": -0.2, "fits": True},
        {"step_s": 1.0, "error": 0.0, "fits": False}, {"step_s": None},
    ]  # fmt: skip
    found = score.scores(rows)
    assert (found["rows"], found["forecast"], found["compared"]) == (4, 3, 3)
    assert (found["mape_pct"], found["bias_pct"], found["median_pct"], found["worst_pct"]) == (
        10.0,
        -3.333,
        10.0,
        -20.0,
    )


def test_rank_correlation_by_hand():
    assert score.spearman([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert score.spearman([1, 2, 3, 4], [40, 30, 20, 10]) == -1
    assert score.spearman([1, 2, 3], [5, 5, 5]) is None


def test_table_is_forecast_and_written(tmp_path, capsys):
    lost = KORTHIKANTI_22B | {"device": "abacus"}
    paths = [table(tmp_path / "a.csv", [KORTHIKANTI_22B, lost]), table(tmp_path / "b.csv", [MEGATRON_76B])]
    argv = [*(f"--table={path}" for path in paths), f"--out={tmp_path / 'out'}", "--fast", "--json"]
    assert validate.main(entry.parse(validate.ValidateRequest, argv)) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["rows"], printed["forecast"]) == (3, 2)
    assert [(s["source_id"], s["rows"], s["forecast"]) for s in printed["by_source"]] == [
        ("korthikanti2022", 2, 1), ("megatron2021", 1, 1),
    ]  # fmt: skip
    assert printed["mape_pct"] < 12  # both are of A100s and printed in full
    (lost_row,) = printed["excused"]
    assert "abacus" in lost_row["reason"]
    written = [json.loads(line) for line in (tmp_path / "out" / validate.ROWS).read_text().splitlines()]
    assert written[0]["error"] == pytest.approx(written[0]["step_s"] / 1.42 - 1)
    assert sum(written[2]["breakdown_s"].values()) == pytest.approx(written[2]["step_s"])
    assert 0.3 < written[2]["mfu"] < 0.4  # 140 of 312, of which a quarter is recomputation


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (lambda r: {k: v for k, v in r.items() if k != "d_model"}, ["no column 'd_model'"]),
        (lambda r: r | {"layers": "many"}, ["t.csv, line 2", "layers='many'", "expected a number"]),
        (lambda r: r | {"layers": "4.5"}, ["t.csv, line 2", "layers=4.5", "nearest: 4"]),
        (lambda r: r | {"step_time_s": "-3"}, ["step_time_s='-3'"]),
    ],
)
def test_bad_table_is_refused_in_one_line(tmp_path, change, fragments):
    path = table(tmp_path / "t.csv", [change(KORTHIKANTI_22B)])
    request = entry.parse(validate.ValidateRequest, [f"--table={path}", f"--out={tmp_path / 'out'}"])
    with pytest.raises(RequestError) as caught:
        validate.main(request)
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_program_ends_with_2_without_a_table(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.validate", f"--table={tmp_path}/none.csv"], capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: --table=")
