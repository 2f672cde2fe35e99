"""Published sizes to the digit, overrides, messages, and the whole of every preset."""

import dataclasses
import math
import os
from pathlib import Path

import pytest

from transformer.accounting import n_embedding_params, n_matmul_params, n_params
from transformer.config import PRESETS, ModelConfig, preset
from transformer.errors import RequestError

GOLDEN = Path(__file__).parents[1] / "golden" / "presets.txt"
SMALL = {"n_layers": 1, "d_model": 8, "n_heads": 6, "n_kv_heads": 2, "d_head": 4, "d_ff": 32, "vocab_size": 16, "max_len": 8}  # fmt: skip

RELEASED = {
    # The released weights, openai/gpt-2.
    "gpt2-124m": 124_439_808,
    "gpt2-350m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    # Model cards of meta-llama, "safetensors parameters".
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
}

GPT3_TABLE_D1 = [  # arXiv:2005.14165: millions, and the unit they are rounded to
    ("gpt3-125m", 125, 1),
    ("gpt3-350m", 356, 1),
    ("gpt3-760m", 760, 1),
    ("gpt3-1.3b", 1_320, 10),
    ("gpt3-2.7b", 2_650, 10),
    ("gpt3-6.7b", 6_660, 10),
    ("gpt3-13b", 12_850, 10),
    ("gpt3-175b", 174_600, 100),
]


@pytest.mark.smoke
@pytest.mark.parametrize(("name", "published"), RELEASED.items())
def test_parameters_of_released_weights(name, published):
    assert n_params(preset(name)) == published


@pytest.mark.parametrize(("name", "millions", "unit"), GPT3_TABLE_D1)
def test_parameters_of_gpt3_table_d1(name, millions, unit):
    assert round(n_params(preset(name)) / 1e6 / unit) * unit == millions


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_matrices_embeddings_and_vectors(name):
    """What is left over are norms and biases: vectors of a layer's width."""
    config = preset(name)
    vectors = n_params(config) - n_matmul_params(config, head=not config.tied) - n_embedding_params(config)
    D, F, kv = config.d_model, config.d_ff, config.n_kv_heads * config.d_head
    norms = (2 * config.n_layers + 1) * D * (2 if config.norm == "layer" else 1)
    biases = config.n_layers * (config.n_heads * config.d_head + 2 * kv + D + F + D) if config.bias else 0
    assert vectors == norms + biases


def test_padding_rows_are_no_parameters():
    config = preset("gpt2-124m")
    assert config.vocab_rows == 50_304  # Megatron-LM's padding of 50,257 to a multiple of 128
    assert n_params(dataclasses.replace(config, vocab_multiple=1)) == n_params(config)
    untied = dataclasses.replace(config, tied=False)
    assert n_params(untied) == n_params(config) + 50_257 * 768
    assert n_matmul_params(config, padded=True) - n_matmul_params(config) == 47 * 768


def test_every_preset_resolved():
    blocks = []
    for name in PRESETS:
        lines = [f"  {key} = {value!r}" for key, value in dataclasses.asdict(preset(name)).items()]
        blocks.append("\n".join([f"{name}: {n_params(preset(name)):,} parameters", *lines]))
    text = "\n".join(blocks) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_every_axis_fits_tiny():
    config = preset("tiny")
    dims = (config.n_layers, config.n_heads, config.n_kv_heads, config.d_model, config.d_ff, config.vocab_rows)
    assert all(dim % 8 == 0 for dim in dims)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("n_layers", "12", 12),
        ("rope_theta", "5e5", 500_000.0),
        ("norm", "layer", "layer"),
        ("bias", "true", True),
        ("tied", "False", False),
        ("window", "64", 64),
        ("window", "none", None),
        ("init_std", "1", 1.0),
    ],
)
def test_override_is_typed(key, text, value):
    got = getattr(preset("tiny", {key: text}), key)
    assert got == value
    assert type(got) is type(value)


def test_override_changes_nothing_else():
    want = dataclasses.asdict(preset("tiny")) | {"n_layers": 2}
    assert dataclasses.asdict(preset("tiny", {"n_layers": "2"})) == want


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("lama3-8b", {}, "unknown preset 'lama3-8b': did you mean 'llama3-8b'?"),
        ("tiny", {"n_layer": "2"}, "unknown key --model.n_layer: did you mean 'n_layers'?"),
        ("tiny", {"n_layers": "2.5"}, "--model.n_layers=2.5: expected a whole number"),
        ("tiny", {"window": "wide"}, "--model.window=wide: expected a whole number"),
        ("tiny", {"rope_theta": "big"}, "--model.rope_theta=big: expected a number"),
        ("tiny", {"bias": "yes"}, "--model.bias=yes: expected true or false"),
        ("tiny", {"n_layers": "0"}, "n_layers=0: expected a positive number; nearest: 1"),
        ("tiny", {"window": "-3"}, "window=-3: expected a positive number; nearest: 1"),
        ("tiny", {"norm_eps": "0"}, "norm_eps=0.0: expected a positive number"),
        ("tiny", {"init_std": "nan"}, "init_std=nan: expected a positive number"),
        ("tiny", {"rope_theta": "inf"}, "rope_theta=inf: expected a positive number"),
        ("tiny", {"norm": "rsm"}, "norm='rsm': did you mean 'rms'?"),
        ("tiny", {"ffn": "moe"}, "ffn='moe': known: gelu, swiglu"),
        ("tiny", {"n_kv_heads": "5"}, "n_heads=8 is not a multiple of n_kv_heads=5; nearest that is: 4"),
        ("tiny", {"d_head": "15"}, "d_head=15: rotary positions turn pairs, so d_head must be even; nearest: 16"),
    ],
)
def test_error_names_both_sides_and_the_nearest(name, overrides, message):
    with pytest.raises(RequestError) as caught:
        preset(name, overrides)
    assert str(caught.value) == message


def test_config_itself_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="n_heads=6 is not a multiple of n_kv_heads=4; nearest that is: 3"):
        ModelConfig(**SMALL | {"n_kv_heads": 4})
    assert ModelConfig(**SMALL | {"d_head": 5, "position": "learned"}).d_head == 5  # only rotation needs pairs
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig(**SMALL).n_layers = 2  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(("vocab", "multiple"), [(16, 128), (128, 128), (129, 128), (7, 1), (13, 8)])
def test_vocab_rows_is_the_next_multiple(vocab, multiple):
    rows = ModelConfig(**SMALL | {"vocab_size": vocab, "vocab_multiple": multiple}).vocab_rows
    assert rows == math.ceil(vocab / multiple) * multiple
