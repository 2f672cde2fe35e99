"""From flags to rungs: layouts, batches, and what `auto` comes to."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import entry
from experiments.config import RunConfig, layout_of
from transformer.backends import Chip
from transformer.errors import RequestError
from transformer.sharding import Layout


def request(*argv: str) -> RunConfig:
    return entry.parse(RunConfig, list(argv))


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("text", "n_devices", "layout"),
    [
        ("", 1, Layout()),
        ("", 8, Layout(data=8)),
        ("fsdp=8", 8, Layout(fsdp=8)),
        ("fsdp=2", 8, Layout(data=4, fsdp=2)),
        ("tensor=2,fsdp=2", 8, Layout(data=2, fsdp=2, tensor=2)),
        (" fsdp=2 , tensor=4 ", 8, Layout(fsdp=2, tensor=4)),
        ("data=2,fsdp=4", 8, Layout(data=2, fsdp=4)),
        ("data=8", 8, Layout(data=8)),
        ("64:fsdp=8;1024:fsdp=128,tensor=8", 64, Layout(data=8, fsdp=8)),
        ("64:fsdp=8;1024:fsdp=128,tensor=8", 1000, Layout(data=125, fsdp=8)),
        ("64:fsdp=8;1024:fsdp=128,tensor=8", 1024, Layout(fsdp=128, tensor=8)),
        ("64:fsdp=8;1024:fsdp=128,tensor=8", 40960, Layout(data=40, fsdp=128, tensor=8)),
        ("1024:tensor=8;1:", 512, Layout(data=512)),
    ],
)
def test_layout_of(text, n_devices, layout):
    assert layout_of(text, n_devices) == layout


@pytest.mark.parametrize(
    ("text", "n_devices", "message"),
    [
        ("fsdp=3", 8, "--layout=fsdp=3: 8 devices do not divide by 3; nearest count: 9"),
        ("fsdp=8,tensor=2", 4, "4 devices do not divide by 16; nearest count: 16"),
        ("data=2,fsdp=4", 16, "--layout=data=2,fsdp=4 is of 8 devices, not 16; without data=, it takes what is left"),
        ("fspd=8", 8, "unknown mesh axis 'fspd' in --layout: did you mean 'fsdp'?"),
        ("fsdp=2,fsdp=4", 8, "'fsdp' is given twice, as 2 and 4"),
        ("fsdp=0", 8, "'fsdp=0' is not an axis and its size, as in fsdp=8"),
        ("fsdp=-2", 8, "'fsdp=-2' is not an axis and its size"),
        ("fsdp", 8, "'fsdp' is not an axis and its size"),
        ("fsdp=²", 8, "'fsdp=²' is not an axis and its size"),
        ("8:fsdp=8;fsdp=2", 8, "'fsdp=2' has no device count, as in 64:fsdp=8"),
        ("8:fsdp=8;8:fsdp=2", 8, "8 devices are given twice"),
        ("64:fsdp=8", 8, "no entry at or below 8 devices; the lowest is 64"),
        ("", 0, "--devices=0: expected at least 1"),
    ],
)
def test_wrong_layout_is_refused_by_name(text, n_devices, message):
    with pytest.raises(RequestError) as caught:
        layout_of(text, n_devices)
    assert message in str(caught.value)


def test_nearest_count_of_a_refused_layout_works():
    for n_devices in range(1, 40):
        for text in ("fsdp=3", "fsdp=2,tensor=4"):
            try:
                layout_of(text, n_devices)
            except RequestError as error:
                layout_of(text, int(str(error).rpartition(" ")[2]))


@pytest.mark.parametrize("n_devices", [1, 4, 8])
def test_weak_scaling_fixes_the_sequences_of_a_shard(n_devices):
    rung = request("--micro_batch_seqs=3", "--layout=8:tensor=2;1:").rung(n_devices)
    shards = {1: 1, 4: 4, 8: 4}[n_devices]
    assert (rung.micro_batch_seqs, rung.microbatches, rung.global_batch_seqs) == (3, 1, 3 * shards)


@pytest.mark.parametrize(
    ("n_devices", "micro", "microbatches"), [(1, 4, 8), (2, 4, 4), (4, 4, 2), (8, 4, 1), (16, 2, 1), (32, 1, 1)]
)
def test_strong_scaling_fixes_the_global_batch(n_devices, micro, microbatches):
    run = request("--micro_batch_seqs=4", "--global_batch_seqs=32")
    rung = run.rung(n_devices)
    assert run.scaling == "strong"
    assert (rung.micro_batch_seqs, rung.microbatches, rung.global_batch_seqs) == (micro, microbatches, 32)


def test_default_micro_batch_of_strong_scaling_divides():
    rungs = [request("--global_batch_seqs=24").rung(n) for n in (1, 2, 4, 8)]
    assert [(r.micro_batch_seqs, r.microbatches) for r in rungs] == [(8, 3), (6, 2), (6, 1), (3, 1)]


@pytest.mark.parametrize(
    ("argv", "n_devices", "most"),
    [
        (["--global_batch_seqs=4"], 8, 4),
        (["--global_batch_seqs=6"], 64, 6),
        (["--global_batch_seqs=4", "--layout=tensor=2"], 16, 8),
        (["--global_batch_seqs=12", "--layout=fsdp=8"], 16, None),  # 8 do not divide 12, 16 are more
        (["--global_batch_seqs=24", "--layout=fsdp=8"], 32, 24),
        (["--global_batch_seqs=12", "--layout=fsdp=4"], 64, 12),
        (["--global_batch_seqs=8", "--layout=32:fsdp=32;1:tensor=2"], 64, 16),
        (["--global_batch_seqs=8", "--layout=data=16"], 16, None),
    ],
)
def test_too_many_shards_is_a_failed_rung_that_names_the_largest_count_that_works(argv, n_devices, most):
    run = request(*argv)
    rung = run.rung(n_devices)
    batch = run.global_batch_seqs
    assert rung.failed.startswith(f"{rung.layout.data_shards} data shards for {batch} sequences: ")
    if most is None:
        assert rung.failed.endswith("no smaller count works")
    else:
        assert rung.failed.endswith(f"the largest count that works is {most} devices")
        assert run.rung(most).failed is None
        assert run.rung(most).global_batch_seqs == batch
    for n in range((most or 0) + 1, n_devices):
        assert not works(run, n)


def works(run: RunConfig, n_devices: int) -> bool:
    try:
        return run.rung(n_devices).failed is None
    except RequestError:
        return False


@pytest.mark.parametrize(
    ("argv", "n_devices", "message"),
    [
        (["--global_batch_seqs=30"], 8, "--global_batch_seqs=30 does not divide over 8 data shards at 8 devices; nearest: 32"),
        (
            ["--global_batch_seqs=24", "--micro_batch_seqs=5"],
            2,
            "--micro_batch_seqs=5 does not divide the 12 sequences of a data shard at 2 devices; nearest: 4",
        ),
        (["--preset=gpt2-1.5b", "--layout=tensor=2"], 2, "is 25, which tensor=2 does not divide; nearest: tensor=1"),
        (["--layout=tensor=16"], 16, "which tensor=16 does not divide; nearest: tensor="),
        (["--layout=fsdp=3"], 3, "is 128, which fsdp=3 does not divide; nearest: fsdp="),
    ],
)  # fmt: skip
def test_what_does_not_divide_names_both_sides(argv, n_devices, message):
    with pytest.raises(RequestError) as caught:
        request(*argv).rung(n_devices)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("seq_len", "micro"), [(32, 8), (2048, 8), (2049, 7), (4096, 4), (16_384, 1), (16_385, 1), (100_000, 1)]
)
def test_default_micro_batch_is_8_but_at_most_16384_tokens(seq_len, micro):
    assert request(f"--seq_len={seq_len}").micro_batch == micro


def test_sequence_is_as_long_as_the_preset_was_trained_on():
    assert (request().length, request("--preset=gpt2-124m").length, request("--seq_len=64").length) == (256, 1024, 64)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("argv", "platform", "precision", "attention"),
    [
        ([], "cpu", "f32", "xla"),
        ([], "gpu", "bf16", "cudnn"),
        ([], "tpu", "bf16", "splash"),
        (["--seq_len=4096"], "cpu", "f32", "blockwise"),
        (["--preset=gemma2-9b", "--seq_len=2048"], "gpu", "bf16", "xla"),  # cuDNN has no soft cap
        (["--preset=gemma2-9b"], "tpu", "bf16", "splash"),
        (["--preset=bloom-176b"], "tpu", "bf16", "xla"),  # splash adds no bias
        (["--preset=t5-11b"], "gpu", "bf16", "xla"),  # packed pairs and a bias: too much for cuDNN's one array
        (["--model.prefix=true"], "tpu", "bf16", "xla"),
        (["--precision=f32"], "gpu", "f32", "xla"),
        (["--precision=bf16"], "cpu", "bf16", "xla"),
        (["--attention=xla"], "gpu", "bf16", "xla"),
        (["--attention=cudnn"], "gpu", "bf16", "cudnn"),
    ],
)
def test_auto_is_resolved_by_platform(argv, platform, precision, attention):
    run = request(*argv)
    backend, because = run.resolved_attention(Chip(platform), Layout())
    assert (run.resolved_precision(platform), backend) == (precision, attention)
    assert because.startswith(f"{backend}: ")


@pytest.mark.parametrize(
    ("argv", "platform", "message"),
    [
        (["--attention=cudnn"], "cpu", "cudnn needs an NVIDIA GPU; nearest: --attention=xla"),
        (["--attention=cudnn"], "tpu", "cudnn needs an NVIDIA GPU; nearest: --attention=splash"),
        (["--attention=cudnn", "--precision=f32"], "gpu", "cudnn computes in 16 bit; nearest: --attention=xla"),
        (["--attention=splash"], "gpu", "splash needs a TPU; nearest: --attention=cudnn"),
        (
            ["--attention=splash", "--preset=bloom-176b"],
            "tpu",
            "splash adds no bias to scores; nearest: --attention=xla",
        ),
    ],
)
def test_backend_is_refused_where_it_cannot(argv, platform, message):
    with pytest.raises(RequestError, match=message):
        request(*argv).resolved_attention(Chip(platform), Layout())


@settings(deadline=None, max_examples=100)
@given(
    data=st.sampled_from([1, 2, 3, 5, 40]),
    fsdp=st.sampled_from([1, 2, 8, 32]),
    tensor=st.sampled_from([1, 2, 4, 8]),
    micro=st.integers(1, 6),
    microbatches=st.integers(1, 5),
    weak=st.booleans(),
)
def test_axes_multiply_to_the_devices_and_parts_to_the_batch(data, fsdp, tensor, micro, microbatches, weak):
    n_devices = data * fsdp * tensor
    argv = [f"--layout=fsdp={fsdp},tensor={tensor}", f"--micro_batch_seqs={micro}"]
    batch = micro * data * fsdp if weak else micro * microbatches * data * fsdp
    rung = request(*argv, *([] if weak else [f"--global_batch_seqs={batch}"])).rung(n_devices)
    assert rung.layout == Layout(data=data, fsdp=fsdp, tensor=tensor)
    assert math.prod(rung.layout.sizes) == rung.n_devices == n_devices
    assert rung.micro_batch_seqs * rung.microbatches * rung.layout.data_shards == rung.global_batch_seqs == batch


def test_record_has_the_resolved_request():
    run = request("--model.n_layers=2", "--layout=tensor=2", "--global_batch_seqs=8")
    record = run.record(run.rung(4), kind="forecast", device="h100-sxm", chip=Chip("gpu"))
    layout = {"data": 2, "fsdp": 1, "tensor": 2, "microbatches": 1, "remat": "full", "precision": "bf16"}
    assert record["layout"].items() >= layout.items()
    assert record["layout"]["attention"] == "cudnn"
    assert (record["model"]["n_layers"], record["config"]["model"]) == (2, {"n_layers": "2"})
    assert (record["scaling"], record["global_batch_seqs"], record["seq_len"]) == ("strong", 8, 256)
    assert record["attention_because"].startswith("cudnn: ")
    assert record["failed"] is None
