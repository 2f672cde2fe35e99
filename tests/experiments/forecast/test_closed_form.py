"""The closed form against hand calculation and published figures."""

import dataclasses
import time

import pytest

from experiments.forecast.closed_form.memory import (
    activation_bytes,
    activations_of_layer,
    held,
    in_flight,
    memory_bytes,
)
from experiments.forecast.closed_form.practice import Practice, ours
from experiments.forecast.closed_form.setup import Setup
from experiments.forecast.closed_form.step import ClosedForm
from experiments.forecast.closed_form.work import backward_products, layer
from experiments.forecast.kernels import Product
from experiments.hardware import load
from transformer.accounting import hardware_flops_per_token, n_matmul_params, n_params
from transformer.presets import preset
from transformer.sharding import Layout

MEGATRON = Practice(fusion="fused", attention="unfused", dropout=True, copies=3, gradient_bytes=2, reduce_bytes=2)
A100 = load().device("a100-80g-sxm")
GPT_22B = preset("megatron-22b")  # h 6144, 64 heads, 48 layers


def setup_of(name, *, mb=1, m=1, seq_len=2048, remat="none", sp=True, practice=MEGATRON, precision="fp16", **axes):
    return Setup(
        model=preset(name), layout=Layout(**axes), seq_len=seq_len, micro_batch_seqs=mb, microbatches=m, remat=remat,
        sequence_parallel=sp, practice=practice, precision=precision,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("sp", "expected"),
    [(False, lambda h, s, a, t: 10 + 24 / t + 5 * a * s / h / t), (True, lambda h, s, a, t: (34 + 5 * a * s / h) / t)],
)
def test_activations_are_those_of_korthikanti_et_al(sp, expected):
    """arXiv:2205.05198, eq. 2 and 4: s b h (10 + 24/t + 5 a s / h t), and s b h / t (34 + 5 a s / h)."""
    setup = setup_of("megatron-22b", mb=4, tensor=8, sp=sp)
    found = activations_of_layer(setup)
    h, s, a, t, b = 6144, 2048, 64, 8, 4
    assert found["kept"] + found["scores"] == pytest.approx(s * b * h * expected(h, s, a, t), rel=0.07)
    assert found["scores"] == s * b * h * 5 * a * s / h / t


def test_the_one_head_that_all_queries_share_is_on_every_device_of_tensor():
    """PaLM's: 48 heads of queries, one of keys and values, 256 wide, in bfloat16."""
    split = setup_of("palm-540b", tensor=12, precision="bf16", practice=ours("cudnn", Layout()))
    shared = 2048 * 2 * 256 * 2
    assert layer(split, split.model.kind(0)).kv_bytes == shared
    more = dataclasses.replace(split, model=dataclasses.replace(split.model, n_kv_heads=24))  # two on each device
    assert activations_of_layer(more)["kept"] - activations_of_layer(split)["kept"] == shared


def test_interleaved_stage_holds_more_microbatches():
    """The same, sec. 4.2.3: the first stage holds L (1 + (p - 1) / p m) layers' activations of m parts."""
    one = in_flight(setup_of("gpt3-175b", m=64, tensor=8, pipeline=8, repeats=3))
    assert one == pytest.approx(8 * (1 + 7 / 24))
    assert in_flight(setup_of("gpt3-175b", m=64, tensor=8, pipeline=8)) == 8
    assert in_flight(setup_of("gpt3-175b", m=4, tensor=8, pipeline=8)) == 4


@pytest.mark.parametrize(
    ("name", "axes", "mb", "m", "published_gb"),
    [
        ("megatron-22b", {"tensor": 8}, 4, 1, 55.1),
        ("gpt3-175b", {"tensor": 8, "pipeline": 8, "repeats": 3}, 1, 64, 57.9),
        ("megatron-530b", {"tensor": 8, "pipeline": 35, "repeats": 3}, 1, 280, 54.7),
        ("megatron-1t", {"tensor": 8, "pipeline": 64}, 1, 512, 59.5),
    ],
)
def test_memory_of_published_runs(name, axes, mb, m, published_gb):
    """The same, fig. 1 as digitised in calculon-ai/calculon: parameters, optimizer and activations, selective."""
    setup = setup_of(name, mb=mb, m=m, remat="selective", **axes)
    assert sum(memory_bytes(setup, held(setup)).values()) / 1e9 == pytest.approx(published_gb, rel=0.07)


@pytest.mark.parametrize(
    ("name", "axes", "mb", "m", "remat", "sp", "published_s"),
    [
        ("megatron-22b", {"tensor": 8}, 4, 1, "full", False, 1.42),
        ("gpt3-175b", {"tensor": 8, "pipeline": 8, "repeats": 3}, 1, 64, "full", False, 18.13),
        ("gpt3-175b", {"tensor": 8, "pipeline": 8, "repeats": 3}, 1, 64, "selective", True, 13.75),
        ("megatron-1t", {"tensor": 8, "pipeline": 64}, 1, 512, "selective", True, 71.49),
    ],
)
def test_step_of_published_runs(name, axes, mb, m, remat, sp, published_s):
    """The same, table 5, on A100 80 GB; within 12 %, so that a change of physics shows and one of rates does not."""
    setup = setup_of(name, mb=mb, m=m, remat=remat, sp=sp, **axes)
    assert ClosedForm(A100).forecast(setup).step_s == pytest.approx(published_s, rel=0.12)


def test_backward_multiplies_twice_as_much_and_frozen_weights_half_of_that():
    products = (Product(6, 10, 14), Product(22, 26, 34))
    flops = sum(p.flops for p in products)
    assert sum(p.flops for p in backward_products(products)) == 2 * flops
    assert sum(p.flops for p in backward_products(products, frozen=True)) == flops
    assert backward_products((Product(6, 10, 14),)) == (Product(6, 14, 10), Product(14, 10, 6))


@pytest.mark.parametrize("name", ["llama3-8b", "gpt3-1.3b", "mixtral-8x7b", "deepseek-v3"])
def test_products_of_a_layer_are_the_parameters_that_a_token_meets(name):
    config = preset(name)
    setup = setup_of(name, seq_len=256, precision="bf16", practice=Practice())
    total = 0.0
    for i in range(config.n_layers):
        total += sum(p.flops for p in layer(setup, config.kind(i)).forward.products)
    assert total / 256 / 2 == pytest.approx(n_matmul_params(config, head=False), rel=0.01)


def test_arithmetic_is_that_of_accounting():
    """All products and attention of a step are the hardware's FLOPs as `accounting` counts them."""
    config = preset("llama3-8b")
    setup = setup_of("llama3-8b", seq_len=2048, precision="bf16", practice=Practice())
    of = layer(setup, config.kind(0))
    flops = config.n_layers * sum(
        sum(p.flops for p in work.products) + work.attention_flops for work in (of.forward, of.backward)
    )
    flops += 6 * config.d_model * config.vocab_rows * 2048
    counted = hardware_flops_per_token(config, 2048, "none", "cudnn")
    assert flops / 2048 == pytest.approx(counted, rel=0.02)


def test_breakdown_adds_up_and_bubble_is_narayanans():
    """(p - 1) / v of a microbatch's time, arXiv:2104.04473, sec. 2.2."""
    model = ClosedForm(A100)
    plain = model.forecast(setup_of("gpt3-175b", m=64, tensor=8, pipeline=8))
    halved = model.forecast(setup_of("gpt3-175b", m=64, tensor=8, pipeline=8, repeats=2))
    assert sum(plain.breakdown_s.values()) == pytest.approx(plain.step_s)
    assert halved.breakdown_s["bubble"] == pytest.approx(plain.breakdown_s["bubble"] / 2)
    stage = sum(plain.breakdown_s[part] for part in ("matmul", "elementwise", "host", "tensor"))
    assert plain.breakdown_s["bubble"] == pytest.approx(stage * 7 / 64, rel=0.05)  # the head is the last stage's alone


def test_gradients_that_travel_beside_backward_cost_less():
    shown = dataclasses.replace(MEGATRON, data_overlap=False)
    axes = {"tensor": 8, "data": 32}
    hidden, exposed = (
        ClosedForm(A100).forecast(setup_of("megatron-18b", mb=8, practice=p, **axes)) for p in (MEGATRON, shown)
    )
    assert hidden.breakdown_s["data"] < exposed.breakdown_s["data"] / 5
    assert hidden.hidden_s["data"] + hidden.breakdown_s["data"] == pytest.approx(exposed.breakdown_s["data"], rel=0.01)


def test_zero_splits_what_its_stage_says():
    """Rajbhandari et al. 2020, sec. 3: 16 bytes a parameter are 4 + 12/N, 2 + 14/N and 16/N."""
    for zero, whole, split in [(1, 4, 12), (2, 2, 14), (3, 0, 16)]:
        setup = setup_of("gpt3-1.3b", fsdp=8, zero=zero)
        found = memory_bytes(setup, held(setup))
        n = sum(held(setup))
        assert found["weights"] + found["gradients"] + found["optimizer"] == pytest.approx(n * (whole + split / 8))


def test_parameters_on_a_device_are_those_of_the_model():
    for name in ("llama3-8b", "gpt3-1.3b", "mixtral-8x7b"):
        setup = setup_of(name, practice=Practice(), seq_len=512)
        assert sum(held(setup)) == pytest.approx(n_params(preset(name)), rel=0.003)
        split = dataclasses.replace(setup, layout=Layout(tensor=2, pipeline=4))
        table = preset(name).vocab_rows * preset(name).d_model
        layers = n_params(preset(name)) - (1 if preset(name).tied else 2) * table
        assert sum(held(split)) == pytest.approx(layers / 8 + table / 2, rel=0.02)  # the first stage has the table


def test_full_remat_keeps_the_input_of_a_layer():
    setup = setup_of("megatron-22b", mb=4, tensor=8, remat="full", sp=False)
    kept, again = activation_bytes(setup)
    assert kept == 48 * 2 * 2048 * 4 * 6144
    assert again > kept / 48


def test_small_layers_wait_for_the_host():
    slow = dataclasses.replace(MEGATRON, host_s_per_kernel=40e-6)
    model = ClosedForm(A100)
    host = [
        model.forecast(setup_of("gpt2-124m", mb=mb, seq_len=1024, practice=slow)).breakdown_s["host"] for mb in (1, 64)
    ]
    assert host[0] > 5 * host[1]


def test_search_is_fast():
    """Thousands of layouts that share their layers' costs: well above what a search needs, on any machine."""
    config, model = preset("llama3-405b"), ClosedForm(load().device("h100-sxm"))
    setups = [
        Setup(model=config, layout=Layout(tensor=t, pipeline=p, fsdp=16384 // t // p // d, data=d, zero=z), seq_len=8192,
              micro_batch_seqs=1, microbatches=m)
        for t in (1, 2, 4, 8) for p in (1, 2, 4, 8, 16) for d in (1, 2, 4, 8) for z in (1, 3) for m in (4, 8, 16, 32)
    ]  # fmt: skip
    model.forecast(setups[0])
    started = time.perf_counter()
    steps = [model.forecast(setup).step_s for setup in setups]
    assert len(steps) / (time.perf_counter() - started) > 500
    assert model.forecast(setups[7]).step_s == steps[7]


def test_our_recomputation_leaves_out_the_last_product():
    """No gradient reads what a layer's last matrix gives; and all four products of attention's maps are apart."""
    model = ClosedForm(load().device("h100-sxm"))
    mine = setup_of("llama3-8b", remat="full", precision="bf16", practice=ours("cudnn", Layout()), mb=2)
    theirs = dataclasses.replace(mine, practice=dataclasses.replace(mine.practice, repeats_last=True))
    of = layer(mine, mine.model.kind(0))
    *kept, down = of.forward.products
    assert of.again.products == tuple(kept)
    assert (down.m, down.n, down.k) == (2 * 2048, 4096, 14336)
    assert [p.n for p in of.forward.products] == [4096, 1024, 1024, 4096, 14336, 14336, 4096]
    less = model.forecast(theirs).breakdown_s["matmul"] - model.forecast(mine).breakdown_s["matmul"]
    assert less == pytest.approx(32 * model.rates.product_in_step_s(down))


def test_what_hides_beside_the_product_before_leaves_the_first_matrix_and_the_ends():
    """Of llama3-8b on one node every matrix but keys and values comes in time, and all gradients leave in time but the
    last layer's; the embedding comes and leaves in the open, the head for what its own sums' passes do not hide."""
    h100 = load().device("h100-sxm")
    setup = setup_of("llama3-8b", precision="bf16", practice=ours("cudnn", Layout()), mb=4, fsdp=8)
    model = ClosedForm(h100)
    dense, _ = held(setup)
    gather, scatter = (
        model.places.collective_s(setup.layout.sizes, kind, 2 * dense, ("fsdp",))
        for kind in ("all-gather", "reduce-scatter")
    )
    table = 128_256 * 4096
    layers, of_layer = 1 - 2 * table / dense, 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    first_there, first_back = 4096 * 2048 / of_layer, 4096 * 14336 / of_layer
    passes = model.rates.memory_s(10 * table)
    start = {
        kind: model.places.collective_s(setup.layout.sizes, kind, 1.0, ("fsdp",))
        for kind in ("all-gather", "reduce-scatter")
    }
    shown = layers * gather * (first_there + first_back) + 2 * 32 * start["all-gather"]
    shown += layers * scatter / 32 + start["reduce-scatter"]
    shown += sum(sent * table / dense + max(sent * table / dense - passes, 0) for sent in (gather, scatter))
    assert model.forecast(setup).breakdown_s["fsdp"] == pytest.approx(shown, rel=1e-3)


def test_our_update_reads_a_gradient_twice_and_all_else_once():
    """Adam's state and master weights in float32, read and written (24), the copy in 16 bit (2) with the read that
    casts (4), and a gradient of 16 bit, or of 32 where microbatches add up, for the norm and the update."""
    model = ClosedForm(A100)
    for m, gradient in ((1, 2), (2, 4)):
        setup = setup_of("gpt3-1.3b", m=m, precision="bf16", practice=ours("cudnn", Layout()))
        n_bytes = (24 + 2 + 4 + 2 * gradient) * sum(held(setup))
        assert model.forecast(setup).breakdown_s["optimizer"] == pytest.approx(model.rates.memory_s(n_bytes))


def test_every_matrix_waits_for_its_own_gather():
    """Of 405B's 126 layers each fetches six matrices (keys and values as one) forward and backward and sends their
    gradients once: over 512 nodes, four members in each, a ring of 511 hops, two of which large messages fill."""
    h100 = load().device("h100-sxm")
    setup = setup_of(
        "llama3.1-405b", seq_len=8192, remat="dots", precision="bf16", practice=ours("cudnn", Layout(context=4)), data=4, fsdp=512,
        context=4, tensor=2,
    )  # fmt: skip
    slow = dataclasses.replace(h100, nic_latency_s=2 * h100.nic_latency_s)
    ours_s, slow_s = (ClosedForm(device).forecast(setup).breakdown_s["fsdp"] for device in (h100, slow))
    assert slow_s - ours_s == pytest.approx(126 * (6 + 6 + 1) * (511 - 2) * h100.nic_latency_s, rel=0.1)
    assert min(ClosedForm(h100).forecast(setup).hidden_s.values()) >= 0
