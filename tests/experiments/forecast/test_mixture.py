"""Routed experts in closed form: their rows, their places and their room against hand calculation, and time, memory and
exchange against compiled and simulated schedules of real widths, few layers, few devices."""

import pytest

from experiments.forecast.closed_form import memory
from experiments.forecast.closed_form.mixture import mixture
from experiments.forecast.closed_form.places import EXPERT_SHARDS, Places
from experiments.forecast.closed_form.practice import ours
from experiments.forecast.closed_form.setup import Setup
from experiments.forecast.closed_form.step import ClosedForm
from experiments.forecast.closed_form.work import layer
from experiments.forecast.kernels import Product
from experiments.forecast.network import Fabric
from experiments.hardware import load
from experiments.validation.simulated import simulated, task_of
from transformer.accounting import hardware_flops_per_token
from transformer.presets import preset
from transformer.sharding import Layout

H100 = load().device("h100-sxm")


def setup_of(name: str, layout: Layout, *, mb=1, m=1, remat="full", seq_len=4096, **model: str) -> Setup:
    return Setup(
        model=preset(name, model), layout=layout, seq_len=seq_len, micro_batch_seqs=mb, microbatches=m, remat=remat,
        practice=ours("cudnn", layout),
    )  # fmt: skip


def test_rows_by_capacity_are_room_for_every_expert():
    """Two sequences of 4,096 tokens, 8 of 128 experts each, a quarter more: 320 rows of each expert and sequence; of 16
    experts on a device all of the eight devices' rows. One way, all rows but no matter whose."""
    by_capacity = mixture(setup_of("qwen3-30b-a3b", Layout(expert=8), mb=2, capacity_factor="1.25"))
    rows = 2 * 8 * 320
    assert by_capacity.forward.products == (*[Product(rows, 768, 2048, 16)] * 2, Product(rows, 2048, 768, 16))
    assert by_capacity.rows_bytes == 2 * 128 * 320 * 2048 * 2
    assert not by_capacity.summed_bytes
    split = mixture(setup_of("qwen3-30b-a3b", Layout(tensor=2), mb=2, capacity_factor="1.25"))
    assert split.summed_bytes == by_capacity.rows_bytes
    assert split.rows_bytes == 0


def test_dropless_devices_send_as_many_rows_as_there_might_be():
    """Each of 4,096 tokens may choose all four experts of each of 64 devices: 1,048,576 rows, 15 GB, in blocks of 1,024
    and one more for each expert. The layout does not fit, where with a capacity it would."""
    layout = Layout(pipeline=16, data=2, expert=64)
    sent = mixture(setup_of("deepseek-v3", layout))
    assert sent.rows_bytes == 4096 * 4 * 64 * 7168 * 2
    (loop,) = sent.forward.loops
    assert loop.times == 4096 * 4 * 64 // 1024 + 4
    assert loop.products == (*[Product(1024, 2048, 7168)] * 2, Product(1024, 7168, 2048))
    total = {}
    for factor in ("none", "1.25"):
        setup = setup_of("deepseek-v3", layout, m=32, capacity_factor=factor)
        total[factor] = sum(memory.memory_bytes(setup, memory.held(setup)).values())
    assert H100.usable_bytes
    assert total["1.25"] < 0.5 * H100.usable_bytes < H100.usable_bytes < total["none"]


@pytest.mark.parametrize("factor", ["none", "1.25"])
def test_products_are_those_that_accounting_counts(factor):
    """Padded blocks and capacities, with what else a layer multiplies and the head."""
    setup = setup_of("mixtral-8x7b", Layout(), mb=2, remat="none", capacity_factor=factor, n_layers="1")
    config, tokens = setup.model, 2 * 4096
    of, routed = layer(setup, config.kind(0)), mixture(setup)
    flops = 6.0 * tokens * config.d_model * config.vocab_rows
    for work in (of.forward, of.backward, routed.forward, routed.backward):
        flops += sum(p.flops for p in work.products) + work.attention_flops
        flops += sum(loop.times * p.flops for loop in work.loops for p in loop.products)
    counted = hardware_flops_per_token(config, 4096, "none", "cudnn", micro_batch_seqs=2)
    assert flops / tokens == pytest.approx(counted, rel=5e-3)


def test_layers_of_a_stage_have_room_for_the_fullest():
    """DeepSeek V3's 58 layers of experts over 16 stages are 4 on each, worked off in every tick; its 3 dense layers
    every stage works off for a sixteenth of the microbatches."""
    setup = setup_of("deepseek-v3", Layout(pipeline=16))
    assert {kind.experts: n for (kind, _, _), n in memory.layers_of_stage(setup).items()} == {False: 3 / 16, True: 4}
    twice = setup_of("deepseek-v3", Layout(pipeline=8, repeats=2))
    assert {kind.experts: n for (kind, _, _), n in memory.layers_of_stage(twice).items()} == {False: 3 / 8, True: 8}


def test_experts_weights_are_gathered_between_nodes_where_a_node_has_all_experts():
    """An fsdp axis of 8 outside of an expert axis of 8 has one device in each node."""
    n_bytes = 1e9
    sizes = Layout(fsdp=8, expert=8).sizes
    spread = Places(H100).collective_s(sizes, "all-gather", n_bytes, EXPERT_SHARDS)
    assert spread == pytest.approx(Fabric(H100).along_s("all-gather", n_bytes, (8, 8)), rel=1e-3)
    beside = Places(H100).collective_s(Layout(fsdp=8).sizes, "all-gather", n_bytes, EXPERT_SHARDS)
    assert spread > 5 * beside


GRID = [
    ("mixtral-8x7b", "1.25", Layout(expert=4, tensor=2), 2, 1, "full"),
    ("qwen3-30b-a3b", "1.25", Layout(expert=8), 2, 2, "dots"),
    ("qwen3-30b-a3b", "none", Layout(expert=8), 2, 1, "full"),
]
"""Model, capacity, layout, sequences of a microbatch, microbatches, remat."""


@pytest.mark.deviceless
def test_experts_in_closed_form_are_within_10_percent_of_the_simulated_schedule():
    """Memory from 20 % below to 40 above, for of so few layers what one needs weighs most. And the compiled step sends
    each row as often as it should: nothing of one layer is sent again in another."""
    times, rooms = {}, {}
    for name, factor, layout, mb, m, remat in GRID:
        setup = setup_of(name, layout, mb=mb, m=m, remat=remat, capacity_factor=factor, n_layers="4")
        record = simulated(task_of(setup, H100))
        assert record["failed"] is None
        found = ClosedForm(H100).forecast(setup)
        times[name, factor, str(layout)] = found.step_s / record["step_s"]["median"]
        rooms[name, factor, str(layout)] = found.total_bytes / record["memory_bytes"]["total"]
        if layout.expert > 1:
            assert record["collectives"]["expert all-to-all"]["ratio"] == pytest.approx(1, abs=1e-3)
    assert all(abs(ratio - 1) <= 0.1 for ratio in times.values()), times
    assert all(0.8 < ratio < 1.4 for ratio in rooms.values()), rooms
