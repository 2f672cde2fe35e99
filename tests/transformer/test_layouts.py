"""What a layout cannot do is refused with the numbers and the nearest that can; valid ones are all there are."""

import math

import pytest

from transformer.errors import RequestError
from transformer.layouts import Split, check, covering, valid
from transformer.presets import preset
from transformer.sharding import AXES, Layout

EXPERTS = {"n_experts": "8"}


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("name", "overrides", "split", "length", "message"),
    [
        ("tiny", {}, Split(Layout(expert=2)), 64, "expert=2: the model has no experts; nearest: fsdp=2"),
        ("tiny", EXPERTS, Split(Layout(expert=3)), 64, "embedding/tokens: dim 'embed' is 128, which expert=3 does not divide; nearest: expert=2"),
        ("tiny", {}, Split(Layout(fsdp=3, context=2)), 64, "embedding/tokens: dim 'embed' is 128, which fsdp=3,context=2 does not divide; nearest: a product of 4"),
        ("tiny", {}, Split(Layout(ring=1)), 64, "ring=1 is of the context axis, and context=1; nearest: ring=0"),
        ("tiny", {}, Split(Layout(context=4)), 60, "--seq_len=60 does not split over context=4,tensor=1: expected a multiple of 8; nearest: --seq_len=64"),
        ("tiny", {}, Split(Layout(tensor=8)), 20, "--seq_len=20 does not split over context=1,tensor=8: expected a multiple of 8; nearest: --seq_len=16"),
        ("tiny", EXPERTS | {"capacity_factor": "1"}, Split(Layout(context=2)), 64, "context=2: which tokens experts of a capacity drop depends on the whole sequence; nearest: --model.capacity_factor=none"),
        ("tiny", {}, Split(Layout(repeats=2)), 64, "repeats=2 is of the pipeline axis, and pipeline=1; nearest: repeats=1"),
        ("t5-small", {}, Split(Layout(pipeline=2), 2), 64, "pipeline=2: an encoder_decoder has two stacks, of which one reads the other's end; nearest: fsdp=2"),
        ("tiny", {"dropout": "0.1"}, Split(Layout(pipeline=2), 2), 64, "pipeline=2 has no dropout, which is 0.1; nearest: --model.dropout=0"),
        ("gemma3-12b", {"n_layers": "14"}, Split(Layout(pipeline=2), 2), 64, "pipeline=2 needs layers that repeat up to the last, and before them none with experts; these are 2 x 6, 2 x 1; nearest: pipeline=1"),
        ("tiny", {}, Split(Layout(pipeline=4, repeats=4), 4), 64, "pipeline=4,repeats=4: 8 layers are fewer than 16 parts; nearest: 8 parts"),
        ("tiny", {"window": "4", "global_every": "2"}, Split(Layout(pipeline=8), 8), 64, "pipeline=8,repeats=1: 4 of 2 layers are fewer than 8 parts; nearest: 4 parts"),
        ("tiny", {}, Split(Layout(pipeline=4, repeats=2), 6), 64, "pipeline=4,repeats=2: 6 microbatches do not pass in groups of 4; nearest: --microbatches=8"),
    ],
)  # fmt: skip
def test_refused_with_the_numbers_and_the_nearest(name, overrides, split, length, message):
    with pytest.raises(RequestError) as caught:
        check(preset(name, overrides), split, length=length)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("overrides", "least"), [({}, 100), ({"family": "encoder"}, 100), ({"family": "encoder_decoder"}, 60), (EXPERTS, 200)]
)  # fmt: skip
def test_valid_layouts_are_many_and_pass_the_check(overrides, least):
    config = preset("tiny", overrides)
    found = list(valid(config, 8, length=64, batch=16))
    assert len(found) == len(set(found)) >= least
    for split in found:
        check(config, split, length=64)
        assert split.layout.n_devices == 8
        assert 16 % (split.layout.data_shards * split.microbatches) == 0
    used = {axis for axis in AXES for split in found if getattr(split.layout, axis) > 1}
    without = {"expert"} if "n_experts" not in overrides else set()
    without |= {"pipeline"} if overrides.get("family") == "encoder_decoder" else set()
    assert used == set(AXES) - without
    assert {split.layout.zero for split in found} == {1, 2, 3}


def test_an_odd_number_of_devices_has_layouts_too():
    found = list(valid(preset("tiny"), 6, length=48, batch=12))
    assert {math.prod(split.layout.sizes) for split in found} == {6}
    assert {split.layout.data for split in found} == {1, 2, 3, 6}


def test_forty_layouts_try_every_axis_with_every_other():
    """But expert with the rest of eight devices' worth of three axes, pairs are few: forty cover them all."""
    found = list(valid(preset("tiny", EXPERTS), 8, length=64, batch=16))
    chosen = covering(found, 40)
    assert len(chosen) == 40

    def together(splits):
        return {
            (a, b)
            for split in splits
            for a in AXES
            for b in AXES
            if a < b and getattr(split.layout, a) > 1 and getattr(split.layout, b) > 1
        }

    assert together(chosen) == together(found)
    assert len(together(covering(found, 6))) > len(together(found[:6]))  # the first ones try most
    assert set(covering(found, 10**6)) == set(found)
