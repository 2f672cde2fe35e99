"""Counts by kind of parameter, layers as repeated blocks, overrides, messages."""

import dataclasses
import math
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer.accounting import n_embedding_params, n_matmul_params, n_params
from transformer.config import LayerKind, ModelConfig
from transformer.errors import RequestError
from transformer.presets import preset

SMALL = {"n_layers": 1, "d_model": 8, "n_heads": 6, "n_kv_heads": 2, "d_head": 4, "d_ff": 32, "vocab_size": 16, "max_len": 8}  # fmt: skip


@pytest.mark.parametrize("name", ["tiny", "gpt2-124m", "gpt3-175b", "llama2-7b", "llama3-70b"])
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


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("n_layers", "12", 12),
        ("rope_theta", "5e5", 500_000.0),
        ("norm", "layer", "layer"),
        ("family", "encoder", "encoder"),
        ("bias", "true", True),
        ("tied", "False", False),
        ("window", "64", 64),
        ("window", "none", None),
        ("n_experts", "4", 4),
        ("n_experts", "None", None),
        ("score_cap", "30", 30.0),
        ("score_cap", "none", None),
        ("score_cap", "1.25", 1.25),
        ("capacity_factor", "none", None),
        ("dropout", "0", 0.0),
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


LATENT = {"kv_rank": "8", "n_kv_heads": "8", "d_rope": "4"}
EXPERTS = {"n_experts": "8"}


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        # What is no key, no number, no option.
        ("lama3-8b", {}, "unknown preset 'lama3-8b': did you mean 'llama3-8b'?"),
        ("tiny", {"n_layer": "2"}, "unknown key --model.n_layer: did you mean 'n_layers'?"),
        ("tiny", {"n_layers": "2.5"}, "--model.n_layers=2.5: expected a whole number"),
        ("tiny", {"n_layers": "none"}, "--model.n_layers=none: expected a whole number"),
        ("tiny", {"window": "wide"}, "--model.window=wide: expected a whole number"),
        ("tiny", {"rope_theta": "big"}, "--model.rope_theta=big: expected a number"),
        ("tiny", {"logit_cap": "big"}, "--model.logit_cap=big: expected a number"),
        ("tiny", {"bias": "yes"}, "--model.bias=yes: expected true or false"),
        ("tiny", {"n_layers": "0"}, "n_layers=0: expected a positive number; nearest: 1"),
        ("tiny", {"window": "-3"}, "window=-3: expected a positive number; nearest: 1"),
        ("tiny", {"norm_eps": "0"}, "norm_eps=0.0: expected a positive number"),
        ("tiny", {"score_cap": "0"}, "score_cap=0.0: expected a positive number"),
        ("tiny", {"dropout": "-0.1"}, "dropout=-0.1: expected 0 or more"),
        ("tiny", {"init_std": "nan"}, "init_std=nan: expected a positive number"),
        ("tiny", {"rope_theta": "inf"}, "rope_theta=inf: expected a positive number"),
        ("tiny", {"norm": "rsm"}, "norm='rsm': did you mean 'rms'?"),
        ("tiny", {"family": "encoder_decode"}, "family='encoder_decode': did you mean 'encoder_decoder'?"),
        ("tiny", {"ffn": "moe"}, "ffn='moe': known: geglu, gelu, gelu_exact, relu, relu2, swiglu"),
        ("tiny", {"score": "luong"}, "score='luong': known: additive, cosine, dot, scaled_dot"),
        # Heads, windows, latents.
        ("tiny", {"n_kv_heads": "5"}, "n_heads=8 is not a multiple of n_kv_heads=5; nearest that is: 4"),
        ("tiny", {"share": "query_key", "n_kv_heads": "2"}, "share='query_key' makes queries the keys, so n_kv_heads=2 must be n_heads; nearest: 8"),
        ("tiny", {"share": "key_value", "d_value": "7"}, "share='key_value' makes values the keys, so d_value=7 must be d_head; nearest: 16"),
        ("tiny", {"window": "4", "chunk": "8"}, "window=4 and chunk=8: a local layer has one of the two"),
        ("tiny", {"global_every": "3"}, "global_every=3 without a window or chunk: every layer sees all"),
        ("tiny", {"q_rank": "3"}, "q_rank=3 is of latent attention: give kv_rank too"),
        ("tiny", {"d_rope": "4"}, "d_rope=4 is of latent attention: give kv_rank too"),
        ("tiny", LATENT | {"d_rope": "none"}, "kv_rank=8 makes attention latent, and then d_rope=None must be given, below d_head; nearest: 8"),
        ("tiny", LATENT | {"d_rope": "16"}, "kv_rank=8 makes attention latent, and then d_rope=16 must be given, below d_head; nearest: 8"),
        ("tiny", LATENT | {"n_kv_heads": "4"}, "kv_rank=8 makes attention latent: expected n_kv_heads=8 and share=none, not 4 and none"),
        ("tiny", LATENT | {"share": "key_value"}, "kv_rank=8 makes attention latent: expected n_kv_heads=8 and share=none, not 8 and key_value"),
        # Positions.
        ("tiny", {"d_head": "15"}, "d_head=15: rotary positions turn pairs, so d_head must be even; nearest: 16"),
        ("tiny", {"rope_fraction": "1.5"}, "rope_fraction=1.5: expected at most 1; nearest: 1"),
        ("tiny", {"rope_fraction": "0.2"}, "3 of d_head=16 rotate: expected an even number"),
        ("tiny", LATENT | {"d_rope": "3"}, "3 of d_head=16 rotate: expected an even number"),
        ("tiny", {"rope_scaling": "yarn"}, "rope_scaling='yarn' needs rope_trained_len, such as 256"),
        ("tiny", {"rope_scaling": "llama3"}, "rope_scaling='llama3' needs rope_trained_len, such as 256"),
        ("tiny", {"rope_scaling": "linear", "position": "alibi"}, "rope_scaling='linear' is of rotary positions, not of position='alibi'; nearest: rope_scaling=none"),
        ("tiny", {"rope_factor": "8"}, "rope_factor=8.0 stretches nothing without rope_scaling; nearest: rope_scaling=linear"),
        ("tiny", {"rope_theta_local": "1e4"}, "rope_theta_local=10000.0 is of local layers, and without window or chunk there are none; nearest: rope_theta=10000.0"),
        ("tiny", {"rope_theta": "1"}, "rope_theta=1.0: expected above 1, such as 10000"),
        # Experts.
        ("tiny", {"n_experts": "4", "experts_per_token": "1"}, "router_normalize=True of experts_per_token=1: every weight is 1, and no gradient reaches the router; nearest: router_normalize=false"),
        ("tiny", {"experts_per_token": "3"}, "experts_per_token=3 is of a mixture of experts: expected n_experts too"),
        ("tiny", {"n_shared_experts": "1"}, "n_shared_experts=1 is of a mixture of experts: expected n_experts too"),
        ("tiny", {"capacity_factor": "1.25"}, "capacity_factor=1.25 is of a mixture of experts: expected n_experts too"),
        ("tiny", {"n_experts": "4", "moe_every": "9"}, "moe_every=9 leaves none of n_layers=8 with experts; nearest: 1"),
        ("tiny", {"n_experts": "4", "bias": "true"}, "bias=True: experts have no biases; nearest: qkv_bias=true"),
        ("t5-small", {"parallel": "true"}, "parallel layers have no cross-attention: family='encoder_decoder'; nearest: parallel=false"),
        ("tiny", {"parallel_norms": "true"}, "parallel_norms=True is of parallel layers: expected parallel=true too"),
        ("t5-small", {"relative_distance": "16"}, "relative_buckets=32, relative_distance=16: expected at least 4 buckets, and a distance above 16"),
        ("tiny", {"rope_fraction": "0.01"}, "rope_fraction=0.01 of d_head=16 rotates nothing; nearest: 1"),
        ("deepseek-v3", {"qk_norm": "true"}, "latent attention (kv_rank) norms its latents and has no biases: no qk_norm, bias, qkv_bias"),
        ("tiny", {"n_experts": "2", "experts_per_token": "3"}, "n_experts=2 is fewer than experts_per_token=3; nearest: experts_per_token=2"),
        ("tiny", EXPERTS | {"router_groups": "2"}, "router_groups=2 and router_top_groups=None: give both or none"),
        ("tiny", EXPERTS | {"router_groups": "3", "router_top_groups": "1"}, "n_experts=8 is not a multiple of router_groups=3"),
        ("tiny", EXPERTS | {"router_groups": "2", "router_top_groups": "3"}, "router_top_groups=3 is more than router_groups=2; nearest: 2"),
        ("tiny", EXPERTS | {"router_groups": "4", "router_top_groups": "1", "experts_per_token": "3"}, "router_top_groups=1 leaves 2 experts to choose experts_per_token=3 from"),
        ("tiny", EXPERTS | {"n_dense_layers": "8"}, "n_dense_layers=8 of n_layers=8 leave none with experts; nearest: 7"),
        # What goes with what.
        ("tiny", {"prefix": "true", "family": "encoder"}, "prefix is of decoders: family='encoder'"),
        ("tiny", {"parallel": "true", "norm_placement": "post"}, "parallel layers are pre-norm, not norm_placement='post'"),
        ("tiny", {"dropout": "1"}, "dropout=1.0, label_smoothing=0.0: expected below 1"),
        ("tiny", {"label_smoothing": "1.5"}, "dropout=0.0, label_smoothing=1.5: expected below 1"),
    ],
)  # fmt: skip
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


def letters(config: ModelConfig) -> str:
    """A letter for each layer's kind: local or global, rotating or not (capital), with experts or not (accent)."""
    names = {(True, True): "l", (True, False): "L", (False, True): "g", (False, False): "G"}
    return "".join(
        names[kind.local, kind.rotates] + "'" * kind.experts for kind in map(config.kind, range(config.n_layers))
    )


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({}, "gggggggg"),
        ({"window": 4}, "llllllll"),
        ({"window": 4, "global_every": 3}, "llgllgll"),  # Gemma 3 has 5 and 1
        ({"chunk": 4, "global_every": 4, "no_rope_every": 4}, "lllGlllG"),  # Llama 4
        ({"position": "alibi", "window": 4}, "LLLLLLLL"),
        ({"n_experts": 2}, "g'g'g'g'g'g'g'g'"),
        ({"n_experts": 2, "n_dense_layers": 3}, "gggg'g'g'g'g'"),  # DeepSeek-V3
        ({"n_experts": 2, "moe_every": 2}, "gg'gg'gg'gg'"),
        ({"n_experts": 2, "moe_every": 3, "n_dense_layers": 3}, "gggggg'gg"),
    ],
    ids=str,
)
def test_kinds_of_layers_are_listed(changes, want):
    assert letters(ModelConfig(**SMALL | {"n_layers": 8} | changes)) == want


KINDS = [LayerKind(local, True, experts) for local in (False, True) for experts in (False, True)]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=14))
def test_blocks_one_after_another_are_the_layers(kinds):
    config = ModelConfig(**SMALL | {"n_layers": len(kinds)})
    with mock.patch.object(ModelConfig, "kind", side_effect=kinds):
        blocks = config.blocks()
    assert [kind for block in blocks for kind in block.kinds * block.repeats] == kinds
    assert [block.first for block in blocks] == [
        sum(b.repeats * len(b.kinds) for b in blocks[:i]) for i in range(len(blocks))
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"n_layers": 96}, [(0, 96, 1)]),
        ({"n_layers": 34, "window": 4, "global_every": 6}, [(0, 5, 6), (30, 4, 1)]),  # Gemma 3 4B
        ({"n_layers": 48, "chunk": 4, "global_every": 4, "n_experts": 2, "moe_every": 2}, [(0, 12, 4)]),  # Llama 4
        ({"n_layers": 61, "n_experts": 2, "n_dense_layers": 3}, [(0, 3, 1), (3, 58, 1)]),  # DeepSeek-V3
        ({"n_layers": 3, "window": 4, "global_every": 3}, [(0, 2, 1), (2, 1, 1)]),
    ],
    ids=str,
)
def test_a_pattern_that_repeats_is_one_block(changes, want):
    """So that the compiler sees it once."""
    blocks = ModelConfig(**SMALL | changes).blocks()
    assert [(block.first, block.repeats, len(block.kinds)) for block in blocks] == want


def test_sizes_that_follow_from_others():
    config = ModelConfig(**SMALL | {"d_head": 8, "d_ff": 32})
    assert (config.value_size, config.rotating, config.expert_size, config.gated) == (8, 8, 32, True)
    other = ModelConfig(
        **SMALL | {"d_head": 8, "d_value": 3, "rope_fraction": 0.25, "d_expert": 5, "ffn": "relu2", "n_experts": 2}
    )
    assert (other.value_size, other.rotating, other.expert_size, other.gated) == (3, 2, 5, False)
    latent = ModelConfig(**SMALL | {"n_kv_heads": 6, "kv_rank": 2, "d_rope": 2, "d_value": 5})
    assert (latent.value_size, latent.rotating) == (5, 2)
