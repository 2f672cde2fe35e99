"""What a step sends, in closed form, against what is worked out by hand."""

import dataclasses
import math

import pytest

from transformer.communication import Step, by_axis
from transformer.config import ModelConfig
from transformer.models import model_params
from transformer.params import leaves
from transformer.presets import preset
from transformer.sharding import Layout

D, F, V, N, K, H, LAYERS, LENGTH = 64, 192, 512, 8, 4, 8, 6, 256
DENSE = ModelConfig(n_layers=LAYERS, d_model=D, n_heads=N, n_kv_heads=K, d_head=H, d_ff=F, vocab_size=V, max_len=LENGTH)
LAYER = 2 * D * N * H + 2 * D * K * H + 3 * D * F  # numbers of a layer's matrices
STREAM = 2 * LENGTH * D * 2  # bytes of two sequences


def sent(layout: Layout, config: ModelConfig = DENSE, **changes) -> dict[str, float]:
    """Bytes by axis and kind, without vectors, of which norms have few."""
    given = {"remat": "full", "precision": "bf16", "microbatches": 1, "micro_batch_seqs": 2, "seq_len": LENGTH}
    step = Step(config=config, layout=layout, **given | changes)
    return dict(by_axis([c for c in step.collectives() if c.n_bytes > 2 * 4 * LAYERS * D]))


def test_parameters_are_gathered_forward_and_backward_and_their_gradients_scattered():
    """ZeRO 3 (Rajbhandari et al. 2020, sec. 7.2.2): three times the parameters, where a replica sends its gradients."""
    layers, ends = 2 * LAYERS * LAYER, 2 * 2 * V * D
    assert sent(Layout(fsdp=8)) == {"fsdp all-gather": 2 * layers + ends, "fsdp reduce-scatter": layers + ends}
    kept = sent(Layout(fsdp=8), remat="none")  # gathered weights too
    assert kept == {"fsdp all-gather": layers + ends, "fsdp reduce-scatter": layers + ends}
    assert sent(Layout(data=8)) == {"data all-reduce": layers + ends}


def test_microbatches_gather_and_scatter_by_zero_stage():
    whole = 2 * (LAYERS * LAYER + 2 * V * D)
    again = 2 * LAYERS * LAYER
    three, two, one = (sent(Layout(fsdp=8, zero=zero), microbatches=4) for zero in (3, 2, 1))
    assert three == {"fsdp all-gather": 4 * (whole + again), "fsdp reduce-scatter": 4 * whole}
    assert two == {"fsdp all-gather": whole, "fsdp reduce-scatter": 4 * whole}
    assert one == {"fsdp all-gather": whole, "fsdp reduce-scatter": 2 * whole}  # once, in float32


def test_replicas_add_up_what_they_store():
    whole = 2 * (LAYERS * LAYER + 2 * V * D)
    found = sent(Layout(slice=2, data=2, fsdp=2))
    assert found["fsdp reduce-scatter"] == whole
    assert found["slice_data all-reduce"] == whole / 2


def test_tensor_gathers_and_scatters_the_stream():
    """Korthikanti et al. 2022, fig. 5: two gathers and two scatters a layer each way. Recomputation makes all of the
    forward pass again but the last scatter; the ends have one of each, each way."""
    both = sent(Layout(tensor=4))
    assert both == {
        "tensor all-gather": (LAYERS * (2 + 2 + 2) + 2) * STREAM,
        "tensor reduce-scatter": (LAYERS * (2 + 1 + 2) + 2) * STREAM,
    }
    kept = sent(Layout(tensor=4), remat="none")
    assert kept["tensor all-gather"] == kept["tensor reduce-scatter"] == (LAYERS * 4 + 2) * STREAM
    parts = sent(Layout(tensor=4, fsdp=2))
    assert parts["fsdp reduce-scatter"] == sent(Layout(fsdp=2))["fsdp reduce-scatter"] / 4  # of each a quarter


def test_context_gathers_keys_and_values_or_passes_them_on():
    keys = 2 * LENGTH * 2 * K * H * 2  # of both sequences, in two bytes
    by_ring, gathered = (sent(Layout(context=4, ring=ring), remat="none") for ring in (1, 0))
    weights = sent(Layout(fsdp=4), remat="none")
    assert gathered["context all-gather"] == LAYERS * keys + weights["fsdp all-gather"]
    assert gathered["context reduce-scatter"] == LAYERS * keys + weights["fsdp reduce-scatter"]
    # A quarter in each of four rounds; backward with gradients in float32.
    assert by_ring["context collective-permute"] == LAYERS * (1 + 3) * keys


@pytest.mark.parametrize(("capacity", "rows"), [(None, 4 * 2 * LENGTH * 2), (1.0, 2 * 2 * LENGTH)])
def test_every_token_travels_to_its_experts_and_back(capacity, rows):
    """Dropless, as many rows as there might be: each of 4 devices may be sent every token, twice. By capacity, two
    experts of a token."""
    experts = ModelConfig(
        n_layers=LAYERS, d_model=D, n_heads=N, n_kv_heads=K, d_head=H, d_ff=F, vocab_size=V, max_len=LENGTH,
        n_experts=8, capacity_factor=capacity,
    )  # fmt: skip
    found = sent(Layout(expert=4), experts)
    assert found["expert all-to-all"] == LAYERS * 2 * (1 + 1 + 1) * rows * D * 2
    kept = sent(Layout(expert=4), experts, remat="dots")  # by capacity what came back, so that the rows alone go again
    assert kept["expert all-to-all"] == LAYERS * (2 + (1 if capacity else 2) + 2) * rows * D * 2
    # Of all else the storage is split over the axis, experts lie where they are used. Routers are float32.
    router = 4 * D * 8
    assert found["expert reduce-scatter"] == LAYERS * (2 * (LAYER - 3 * D * F) + router) + 2 * 2 * V * D


@pytest.mark.parametrize("repeats", [1, 3])
def test_stages_pass_the_stream_on_in_every_tick(repeats):
    """Narayanan et al. 2021, sec. 2.2: v M + S - 1 ticks each way."""
    found = sent(Layout(pipeline=2, repeats=repeats, zero=1), microbatches=4)
    ticks = repeats * 4 + 2 - 1
    assert found["pipeline collective-permute"] == 2 * ticks * STREAM
    entering = 4 + 2 * repeats - 1
    # Looked up in every tick; of each microbatch the head's gradient; in float32 what one stage has and all work on: the
    # head's input, and the embedding's gradient, also in all ticks in which the pipeline runs dry.
    assert found["pipeline all-reduce"] == (ticks + 4 + 2 * 4 + 2 * entering) * STREAM


def test_a_chunk_of_the_loss_is_added_up_where_its_positions_are():
    """Llama 3 405B, 16 stages x tensor 8, one sequence of 8,192: two chunks of 4,096 tokens, each on four of eight
    shards, so that two shards and all stages add up what the head reads. Read from the program compiled for 16,384
    H100s: 9,396,813,824 bytes over pipeline and tensor, 3,154,116,608 over pipeline."""
    layout = Layout(pipeline=16, fsdp=128, tensor=8, zero=1)
    found = sent(layout, preset("llama3.1-405b"), remat="none", microbatches=16, micro_batch_seqs=1, seq_len=8192)
    assert found["pipeline_tensor all-reduce"] == pytest.approx(9_396_813_824, rel=1e-3)
    assert found["pipeline all-reduce"] == pytest.approx(3_154_116_608, rel=1e-3)


def test_a_memory_is_gathered_once_for_all_layers_of_the_decoder():
    """As XLA does: T5 v1.1 XXL on tensor 8."""
    pairs = ModelConfig(
        family="encoder_decoder", n_layers=LAYERS, d_model=D, n_heads=N, n_kv_heads=K, d_head=H, d_ff=F, vocab_size=V,
        max_len=LENGTH,
    )  # fmt: skip
    found = sent(Layout(tensor=4), pairs, remat="none")
    encoder, decoder = 2 + 2, 3 + 3  # both ways; cross-attention reads the stream and, once for all layers, the memory
    assert found["tensor all-gather"] == (LAYERS * (encoder + decoder) + 1 + 3) * STREAM
    assert found["tensor reduce-scatter"] == (LAYERS * (encoder + decoder + 1) + 3) * STREAM, (
        "the memory's gradient too"
    )


def test_all_parameters_count():
    """Each matrix is gathered once where none is needed again."""
    matrices = sum(math.prod(p.shape) for _, p in leaves(model_params(DENSE)) if "embed" in p.dims)
    assert sent(Layout(fsdp=2), remat="none")["fsdp all-gather"] == 2 * matrices


def test_stages_that_divide_neither_layers_nor_stream_gather_all_gradients():
    """Six layers on four stages of a stream of 66: two each, room for eight. BLOOM's 70 on 12 are so. With two parts a
    stage the layers are gathered too."""
    layout = {"pipeline": 4, "zero": 1}
    config = dataclasses.replace(DENSE, d_model=66)
    layers = LAYERS * (LAYER // D * 66)
    assert sent(Layout(**layout), config, microbatches=4)["pipeline all-gather"] == layers * 4
    assert sent(Layout(**layout, repeats=2), config, microbatches=4)["pipeline all-gather"] == layers * (4 + 2)
    divides = sent(Layout(**layout), microbatches=4)
    assert divides["pipeline all-to-all"] == 8 / 4 * LAYER * (4 + 2)


def test_a_normed_embedding_is_looked_up_again_in_a_pipeline():
    """BLOOM's: once in every tick that a gradient arrives in, 4 + 2 - 1."""
    plain, normed = (
        sent(Layout(pipeline=2, tensor=2, zero=1), dataclasses.replace(DENSE, embed_norm=norm), microbatches=4)
        for norm in (False, True)
    )
    key = "pipeline_tensor all-reduce"
    assert normed[key] - plain[key] == 5 * STREAM
