"""Which backend is chosen for a model on a chip, and why; what is asked for and refused."""

from typing import Any

import pytest

from transformer.backends import Chip, Needs, choose, supports
from transformer.errors import RequestError

PLAIN = Needs(d_head=128, d_value=128)


def needs(**given: Any) -> Needs:
    return Needs(**{"d_head": 128, "d_value": 128, **given})


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("wanted", "platform", "precision", "length", "backend"),
    [
        (PLAIN, "tpu", "bf16", 512, "splash"),
        (PLAIN, "tpu", "f32", 8192, "splash"),
        (needs(cap=True, sinks=True, segments=True), "tpu", "bf16", 8192, "splash"),
        (needs(bias=True), "tpu", "bf16", 2048, "xla"),
        (needs(prefix=True), "tpu", "bf16", 2049, "blockwise"),
        (PLAIN, "gpu", "bf16", 512, "cudnn"),
        (PLAIN, "gpu", "f32", 512, "xla"),
        (needs(cap=True), "gpu", "bf16", 8192, "blockwise"),
        (needs(sinks=True), "gpu", "bf16", 512, "xla"),
        (needs(d_head=192), "gpu", "bf16", 8192, "cudnn"),
        (needs(d_head=512), "gpu", "bf16", 8192, "blockwise"),
        (needs(score="additive"), "gpu", "bf16", 512, "blockwise"),
        (needs(score="cosine"), "gpu", "bf16", 512, "cudnn"),
        (needs(segments=True), "gpu", "bf16", 8192, "cudnn"),
        (needs(segments=True), "gpu", "bf16", 8193, "blockwise"),
        (needs(pattern=True), "gpu", "bf16", 32768, "blockwise"),
        (needs(bias=True), "gpu", "bf16", 2048, "cudnn"),
        (needs(bias=True), "gpu", "bf16", 4096, "blockwise"),
        (needs(bias=True, segments=True), "gpu", "bf16", 512, "xla"),
        (needs(split=True), "gpu", "bf16", 512, "cudnn"),
        (needs(split=True, ring=True), "gpu", "bf16", 8192, "cudnn"),
        (needs(split=True, window=True), "gpu", "bf16", 512, "blockwise"),
        (needs(split=True, segments=True), "gpu", "bf16", 512, "blockwise"),
        (needs(split=True, prefix=True), "gpu", "bf16", 512, "blockwise"),
        (needs(split=True, bias=True), "gpu", "bf16", 512, "blockwise"),
        (needs(split=True), "gpu", "f32", 512, "blockwise"),
        (needs(split=True, window=True, pattern=True, sinks=True, cap=True), "tpu", "f32", 8192, "splash"),
        (needs(split=True, ring=True), "tpu", "bf16", 8192, "blockwise"),
        (needs(split=True, segments=True), "tpu", "bf16", 8192, "blockwise"),
        (needs(split=True, both_sides=True), "tpu", "bf16", 8192, "blockwise"),
        (needs(split=True), "cpu", "f32", 512, "blockwise"),
        (PLAIN, "cpu", "f32", 2048, "xla"),
        (PLAIN, "cpu", "f32", 2049, "blockwise"),
    ],
)
def test_auto_takes_the_kernel_where_it_can(wanted, platform, precision, length, backend):
    got, why = choose("auto", wanted, chip=Chip(platform), precision=precision, length=length)
    assert got == backend
    assert why.startswith(f"{backend}: ")
    assert "\n" not in why
    assert supports(backend, wanted, chip=Chip(platform), precision=precision) is None


def test_why_in_full():
    _, why = choose("auto", needs(cap=True), chip=Chip("gpu"), precision="bf16", length=8192)
    assert why == "blockwise: cudnn has no soft cap; 8,192 tokens are more than 2,048"
    _, why = choose("auto", needs(split=True, window=True), chip=Chip("gpu"), precision="bf16", length=8192)
    assert why == "blockwise: cudnn has no mask but a causal one over a split sequence"
    assert choose("xla", PLAIN, chip=Chip("gpu"), precision="bf16", length=9)[1] == "xla: asked for"
    assert choose("blockwise", PLAIN, chip=Chip("cpu"), precision="f32", length=9)[0] == "blockwise"


@pytest.mark.parametrize(
    ("asked", "wanted", "platform", "message"),
    [
        ("cudnn", PLAIN, "tpu", "--attention=cudnn needs an NVIDIA GPU; nearest: --attention=splash"),
        ("cudnn", PLAIN, "cpu", "--attention=cudnn needs an NVIDIA GPU; nearest: --attention=xla"),
        ("cudnn", needs(cap=True), "gpu", "--attention=cudnn has no soft cap; nearest: --attention=xla"),
        ("splash", PLAIN, "gpu", "--attention=splash needs a TPU; nearest: --attention=cudnn"),
        ("splash", needs(bias=True), "tpu", "--attention=splash adds no bias to scores; nearest: --attention=xla"),
        (
            "cudnn",
            needs(split=True, window=True),
            "gpu",
            "--attention=cudnn has no mask but a causal one over a split sequence; nearest: --attention=blockwise",
        ),
        ("xla", needs(split=True), "gpu", "--attention=xla does not split a sequence; nearest: --attention=cudnn"),
        (
            "splash",
            needs(split=True, ring=True),
            "tpu",
            "--attention=splash passes no keys around a ring; nearest: --attention=blockwise",
        ),
        (
            "cudnn",
            needs(split=True, score="additive"),
            "gpu",
            "--attention=cudnn has no additive scores; nearest: context=1",
        ),
        ("flash", PLAIN, "tpu", "--attention=flash: did you mean 'splash'?"),
    ],
)
def test_asked_for_and_refused(asked, wanted, platform, message):
    with pytest.raises(RequestError) as error:
        choose(asked, wanted, chip=Chip(platform), precision="bf16", length=512)
    assert str(error.value) == message


def test_heads_that_cudnn_takes_from_hopper_on():
    """JAX itself refuses 129 to 256 on Ampere."""
    wide = needs(d_head=256, d_value=256)
    found = [
        choose("auto", wide, chip=Chip("gpu", generation), precision="bf16", length=9)
        for generation in [(8, 0), (8, 9), (9, 0), (10, 0), None]
    ]
    assert [backend for backend, _ in found] == ["xla", "xla", "cudnn", "cudnn", "cudnn"]
    assert found[0][1] == "xla: cudnn has heads of at most 128 there; 9 tokens are no more than 2,048"
    with pytest.raises(RequestError, match="cudnn has heads of at most 128 there; nearest: --attention=xla"):
        choose("cudnn", wide, chip=Chip("gpu", (8, 0)), precision="bf16", length=9)
