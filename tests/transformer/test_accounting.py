"""Utilisation, training days and FLOPs against figures that others printed, and against the traced program."""

import jax
import jax.numpy as jnp
import pytest

from experiments.step import TrainStep
from transformer import accounting
from transformer.accounting import model_flops_per_token, train_flops_per_token, utilization
from transformer.config import ModelConfig, preset
from transformer.models import Decoder, apply, decoder_params
from transformer.params import map_params
from transformer.sharding import Layout, make_mesh

A100 = 312e12


@pytest.mark.smoke
def test_mfu_of_palm_540b():
    """PaLM (arXiv:2204.02311) sec. 4.1: 238.3K tokens/s on 6144 TPU v4 is 46.2 % MFU, 45.7 % without attention."""
    run = {"tokens_per_s": 238.3e3, "n_devices": 6144, "peak_flops_per_s": 275e12}
    shape = {"n_params": 540.35e9, "n_layers": 118, "n_heads": 48, "d_head": 256, "length": 2048}
    with_attention = utilization(flops_per_token=train_flops_per_token(**shape), **run)
    without = utilization(flops_per_token=train_flops_per_token(**shape, attention="none"), **run)
    assert (round(with_attention, 3), round(without, 3)) == (0.462, 0.457)


def test_mfu_of_mt_nlg_530b():
    """PaLM app. B: Megatron-Turing NLG, 60.1 s for 1,920 x 2,048 tokens on 2,240 A100: 29.7 %, 30.2 % with attention."""
    run = {"tokens_per_s": 1920 * 2048 / 60.1, "n_devices": 2240, "peak_flops_per_s": A100}
    shape = {"n_params": 530e9, "n_layers": 105, "n_heads": 128, "d_head": 160, "length": 2048}
    assert utilization(flops_per_token=train_flops_per_token(**shape, attention="none"), **run) == pytest.approx(
        0.297, abs=0.001
    )
    assert utilization(flops_per_token=train_flops_per_token(**shape), **run) == pytest.approx(0.302, abs=0.001)


@pytest.mark.parametrize(
    ("layers", "d_model", "heads", "step_s", "batch", "n_devices", "printed"),
    [
        (48, 6144, 64, 1.10, 4, 8, 0.415),
        (96, 12288, 96, 13.75, 64, 64, 0.514),
        (105, 20480, 128, 37.83, 280, 280, 0.560),
        (128, 25600, 160, 71.49, 512, 512, 0.563),
    ],
)
def test_mfu_of_korthikanti_2022(layers, d_model, heads, step_s, batch, n_devices, printed):
    """arXiv:2205.05198 Table 5: measured iteration times and the MFU that it prints for them."""
    config = ModelConfig(
        n_layers=layers, d_model=d_model, n_heads=heads, n_kv_heads=heads, d_head=d_model // heads, d_ff=4 * d_model,
        vocab_size=51_200, max_len=2048, position="learned", norm="layer", ffn="gelu", bias=True, tied=True,
    )  # fmt: skip
    got = utilization(
        flops_per_token=model_flops_per_token(config, 2048), tokens_per_s=batch * 2048 / step_s,
        n_devices=n_devices, peak_flops_per_s=A100,
    )  # fmt: skip
    # step times are printed to 3 or 4 digits, so the ratio holds to about half a percent
    assert got == pytest.approx(printed, rel=0.005)


def test_training_days_of_megatron_2021():
    """arXiv:2104.04473 sec. 5: 175B and 300B tokens, 1,024 A100 at 140 TFLOP/s: 34 days; 1T, 450B, 3,072 at 163: 84."""
    gpt3 = accounting.training_days(n_params=175e9, tokens=300e9, n_devices=1024, flops_per_s_per_device=140e12)
    trillion = accounting.training_days(n_params=1.008e12, tokens=450e9, n_devices=3072, flops_per_s_per_device=163e12)
    assert (round(gpt3), round(trillion)) == (34, 84)


def test_compute_of_published_runs():
    """GPT-3 table D.1: 3.14e23 FLOPs, 3,640 PF-days for 300B tokens. Llama 3 (arXiv:2407.21783): 3.8e25 for 15.6T."""
    shape = {"n_layers": 1, "n_heads": 1, "d_head": 1, "length": 2048, "attention": "none"}
    gpt3 = 300e9 * train_flops_per_token(n_params=accounting.n_params(preset("gpt3-175b")), **shape)
    llama3 = 15.6e12 * train_flops_per_token(n_params=accounting.n_params(preset("llama3-405b")), **shape)
    assert f"{gpt3:.2e}" == "3.14e+23"
    assert round(gpt3 / (1e15 * 86_400), -1) == 3640
    assert f"{llama3:.1e}" == "3.8e+25"


@pytest.mark.parametrize("name", ["tiny", "gpt2-124m", "llama3-8b"])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_traced_program_has_the_flops_of_the_closed_form(name, remat):
    config, length, batch = preset(name), 256, 2
    step = TrainStep(config=config, mesh=make_mesh(Layout()), remat=remat)
    traced = accounting.traced_flops(step.gradients, step.abstract_state.params, step.abstract_batch(batch, length))
    closed = accounting.hardware_flops_per_token(config, length, remat, "xla")
    assert traced / (batch * length) == pytest.approx(closed, rel=1e-12)


def test_traced_forward_is_a_third_of_the_model_flops():
    config = preset("llama3-8b")  # no padding rows
    params = map_params(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), decoder_params(config))
    tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    forward = accounting.traced_flops(lambda p, t: apply(Decoder(config), p, t), params, tokens) / 512
    assert 3 * forward == pytest.approx(model_flops_per_token(config, 512), rel=1e-12)


def test_conventions_of_attention():
    assert accounting.keys_per_query(2048, "full") == 2048
    assert accounting.keys_per_query(2048, "causal") == 1024
    assert accounting.keys_per_query(2048, "none") == 0
    assert accounting.keys_per_query(2048, "full", window=512) == 512
    # half of the first 512 queries' keys are missing: 512 x 512 / 2 of 2048 x 512
    assert accounting.keys_per_query(2048, "causal", window=512) == 512 - 512 * 512 / 2 / 2048


@pytest.mark.parametrize("layout", [Layout(), Layout(fsdp=8), Layout(tensor=8), Layout(2, 2, 2)])
def test_state_bytes_are_those_of_the_shardings(layout):
    from experiments.memory import _shard_bytes

    step = TrainStep(config=preset("tiny"), mesh=make_mesh(layout))
    closed = accounting.state_bytes_per_device(decoder_params(preset("tiny")), layout)
    assert closed["params"] == _shard_bytes(step.abstract_state.params)
    counters = _shard_bytes(step.abstract_state.opt_state) - closed["optimizer"]
    assert 0 <= counters <= 16  # int32 counts of the optimizer's parts
