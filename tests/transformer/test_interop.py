"""Weights and configurations of Hugging Face transformers: there and back, by hand, and what is refused."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from transformer.config import ModelConfig
from transformer.errors import RequestError
from transformer.interop import config_from, from_hf, to_hf
from transformer.interop.configs import READERS
from transformer.interop.tables import TABLES
from transformer.models import model_params
from transformer.params import leaves
from transformer.presets import preset

FIXTURES = {path.stem: path for path in sorted((Path(__file__).parent / "fixtures").glob("*.npz"))}

LLAMA = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 37,
}  # fmt: skip


def config_of(name: str) -> tuple[ModelConfig, str]:
    with np.load(FIXTURES[name]) as stored:
        config = json.loads(str(stored["config"]))
    return config_from(config), config["model_type"]


def random_params(config: ModelConfig) -> dict:
    """Every number another one, from 1/2 to 3/2 in steps that a float32 and its sum with 1 hold; the padding zero."""
    table = dict(leaves(model_params(config)))
    n = sum(math.prod(param.shape) for param in table.values())
    assert n < 2**16
    numbers, tree = 0.5 + np.random.default_rng(0).permutation(n) / np.float32(2**16), {}
    for path, param in table.items():
        size = math.prod(param.shape)
        array, numbers = numbers[:size].reshape(param.shape).astype(np.float32), numbers[size:]
        if "vocab" in param.dims:
            np.moveaxis(array, param.dims.index("vocab"), 0)[config.vocab_size :] = 0
        *parents, name = path.split("/")
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[name] = array
    return tree


@pytest.mark.smoke
@pytest.mark.parametrize("name", FIXTURES)
def test_there_and_back_is_exact(name):
    config, architecture = config_of(name)
    params = random_params(config)
    state = to_hf(params, config, architecture)
    back = from_hf(state, config, architecture)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    again = to_hf(back, config, architecture)
    assert again.keys() == state.keys()
    for key, array in state.items():
        np.testing.assert_array_equal(again[key], array, err_msg=key)


@pytest.mark.parametrize("name", [name for name in FIXTURES if not name.startswith(("gemma", "nemotron"))])
def test_every_number_of_ours_is_in_theirs_once(name):
    """But where theirs is ours less one."""
    config, architecture = config_of(name)
    params = random_params(config)
    ours = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params)])
    theirs = np.concatenate([array.ravel() for array in to_hf(params, config, architecture).values()])
    np.testing.assert_array_equal(np.sort(ours[ours != 0]), np.sort(theirs))


def llama_state(config: ModelConfig) -> dict[str, np.ndarray]:
    return to_hf(random_params(config), config, "llama")


def test_heads_layers_and_vocabulary_by_hand():
    """Head n of theirs is query n % G of kv head n // G; the 38th row of ours is none of theirs."""
    config = config_from(LLAMA)
    state = llama_state(config)
    params = from_hf(state, config, "llama")
    layers = params["decoder"]["block_0"]["layer_0"]
    q = state["model.layers.1.self_attn.q_proj.weight"]  # [4 heads of 2, 8]
    assert layers["attention"]["w_q"].shape == (2, 8, 2, 2, 2)
    assert layers["attention"]["w_q"][1, 5, 1, 0, 1] == q[2 * 2 + 1, 5]
    assert layers["attention"]["w_o"][1, 1, 0, 1, 5] == state["model.layers.1.self_attn.o_proj.weight"][5, 2 * 2 + 1]
    assert layers["ffn"]["w_up"][0, 3, 20] == state["model.layers.0.mlp.up_proj.weight"][20, 3]
    np.testing.assert_array_equal(params["embedding"]["tokens"][:37], state["model.embed_tokens.weight"])
    assert not params["embedding"]["tokens"][37:].any()
    assert params["head"]["w_logits"].shape == (8, 128)


def test_layer_of_theirs_is_the_same_layer_of_ours_where_patterns_are_stacked():
    """8 layers of which every 3rd is global are 2 repeats of 3 and a rest: layer 4 is the second's second."""
    config = dataclasses.replace(config_from(LLAMA), n_layers=8, window=4, global_every=3)
    state = llama_state(config)
    decoder = from_hf(state, config, "llama")["decoder"]
    for i, place in {0: ("block_0", 0, 0), 4: ("block_0", 1, 1), 5: ("block_0", 1, 2), 7: ("block_6", 1, 0)}.items():
        block, repeat, layer = place
        ours = decoder[block][f"layer_{layer}"]["ffn"]["w_up"][repeat]
        np.testing.assert_array_equal(ours.T, state[f"model.layers.{i}.mlp.up_proj.weight"])


def test_fused_queries_keys_and_values_by_hand():
    """Falcon with new_decoder_architecture: for each kv head its queries, its key, its value."""
    config, _ = config_of("falcon_180b")
    state = to_hf(random_params(config), config, "falcon")
    attention = from_hf(state, config, "falcon")["decoder"]["block_0"]["layer_0"]["attention"]
    fused = state["transformer.h.1.self_attention.query_key_value.weight"].reshape(2, 4, 6, 24)
    np.testing.assert_array_equal(attention["w_q"][1, :, 1, 0], fused[1, 0].T)
    np.testing.assert_array_equal(attention["w_k"][1, :, 1], fused[1, 2].T)
    np.testing.assert_array_equal(attention["w_v"][1, :, 0], fused[0, 3].T)


def test_rotating_neighbours_become_halves():
    config, _ = config_of("deepseek_v3")  # 6 that stand, 4 that turn
    state = to_hf(random_params(config), config, "deepseek_v3")
    attention = from_hf(state, config, "deepseek_v3")["decoder"]["block_0"]["layer_0"]["attention"]
    q = state["model.layers.0.self_attn.q_b_proj.weight"].reshape(4, 10, 14)
    np.testing.assert_array_equal(attention["w_q_up"][0, :, 2].T, q[2, [0, 1, 2, 3, 4, 5, 6, 8, 7, 9]])
    down = state["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]
    np.testing.assert_array_equal(attention["w_kv_down"][0].T, down[:10])
    np.testing.assert_array_equal(attention["w_k_rope"][0].T, down[10:][[0, 2, 1, 3]])


def test_scale_of_theirs_is_ours_less_one():
    config, _ = config_of("gemma2")
    params = random_params(config)
    state = to_hf(params, config, "gemma2")
    np.testing.assert_array_equal(state["model.norm.weight"] + 1, params["decoder"]["final_norm"]["scale"])


def test_dtype_is_kept():
    config = config_from(LLAMA)
    half = {key: array.astype(np.float16) for key, array in llama_state(config).items()}
    assert {leaf.dtype for leaf in jax.tree.leaves(from_hf(half, config, "llama"))} == {np.dtype(np.float16)}


def test_files_without_head_or_with_more_than_weights_are_read():
    config, _ = config_of("bert")
    bare = dataclasses.replace(config, head_transform=False, head_bias=False)
    state = to_hf(random_params(bare), bare, "bert")
    headless = {key.removeprefix("bert."): array for key, array in state.items()}
    older = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): array
        for key, array in headless.items()
    }
    assert older.keys() != headless.keys() != state.keys()
    more = {"pooler.dense.weight": np.ones((24, 24)), "embeddings.position_ids": np.arange(18)[None]}
    for given in (headless, older | more):
        jax.tree.map(np.testing.assert_array_equal, from_hf(given, bare, "bert"), from_hf(state, bare, "bert"))


def test_head_that_repeats_the_embedding_is_read_and_one_that_differs_is_not():
    config = config_from(LLAMA | {"tie_word_embeddings": True})
    state = llama_state(config)
    assert "lm_head.weight" not in state
    tokens = state["model.embed_tokens.weight"]
    from_hf(state | {"lm_head.weight": tokens.copy()}, config, "llama")
    with pytest.raises(
        RequestError, match="'lm_head.weight' differs from 'model.embed_tokens.weight', which it repeats"
    ):
        from_hf(state | {"lm_head.weight": tokens + 1}, config, "llama")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "the weights have no 'model.norm.weight', expected with shape (8,); did you mean 'model.embed_tokens.weight'?"),
        (
            {"model.layers.1.mlp.up_proj.weight": None},
            "the weights have no 'model.layers.1.mlp.up_proj.weight', expected with shape (24, 8); did you mean 'model.layers.0.mlp.up_proj.weight'?",
        ),
        ({"model.norm.weight": np.ones(7)}, "'model.norm.weight' has shape (7,), expected (8,)"),
        ({"model.embed_tokens.weight": np.ones((128, 8))}, "'model.embed_tokens.weight' has shape (128, 8), expected (37, 8)"),
        ({"model.norm.bias": np.ones(8)}, "'model.norm.bias' of shape (8,) has no place in this llama"),
        ({"model.layers.2.mlp.up_proj.weight": np.ones((24, 8))}, "'model.layers.2.mlp.up_proj.weight' of shape (24, 8) has no place in this llama"),
    ],
    ids=["missing", "missing-layer", "shape", "padded", "more", "more-layers"],
)  # fmt: skip
def test_weights_that_are_not_of_the_model_are_refused(change, message):
    config = config_from(LLAMA)
    state = {key: array for key, array in (llama_state(config) | change).items() if array is not None}
    with pytest.raises(RequestError) as refused:
        from_hf(state, config, "llama")
    assert str(refused.value) == message


def test_model_that_an_architecture_has_no_names_for_is_refused():
    with pytest.raises(RequestError, match=r"^llama has nothing for decoder/block_0/layer_0/attention/sinks of shape"):
        from_hf({}, dataclasses.replace(config_from(LLAMA), sinks=True), "llama")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "lama"}, "config.json's model_type='lama' is unknown: did you mean 'llama'?"),
        ({"model_type": "gemma3"}, "config.json's model_type='gemma3' is unknown: did you mean 'gemma'?"),
        ({"model_type": "gpt_oss"}, "config.json's model_type='gpt_oss' is unknown: did you mean 'gpt_neox'?"),
        ({}, "config.json's model_type='None' is unknown: known: "),
        ({"model_type": "llama", "hidden_size": 8}, "config.json of llama has no num_attention_heads"),
        (LLAMA | {"hidden_act": "gelu"}, "llama with hidden_act='gelu' cannot be computed; did you mean 'gelu_new'?"),
        (LLAMA | {"mlp_bias": True}, "llama with mlp_bias=True cannot be computed; expected False"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope type 'dynamic' cannot be computed; known: default, linear, llama3, yarn"),
        (
            LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 2, "high_freq_factor": 4, "original_max_position_embeddings": 8}},
            "llama's llama3 rope with low_freq_factor=2 cannot be computed; expected 1",
        ),
        (LLAMA | {"rope_scaling": {"rope_type": "yarn"}}, "config.json of llama's yarn rope has no factor"),
        (
            LLAMA | {"partial_rotary_factor": 0.5, "max_position_embeddings": 64, "rope_scaling": {"rope_type": "yarn", "factor": 8}},
            "llama: its yarn rope multiplies by 1.208 what turns of a head, and not all of it turns; expected 1",
        ),
        (
            LLAMA | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            "qwen2 with a window in layers [1] cannot be computed; expected all, or all but every n-th",
        ),
        (
            {"model_type": "marian", "vocab_size": 37, "d_model": 8, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "activation_function": "swish"},
            "marian with activation_function='swish' cannot be computed; known: ",
        ),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else "",
)  # fmt: skip
def test_configuration_that_cannot_be_computed_is_refused(config, message):
    with pytest.raises(RequestError) as refused:
        config_from(config)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


def test_rotary_keys_of_transformers_4_and_5_read_alike():
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}
    new = LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}}
    assert config_from(old) == config_from(new)
    gemma = LLAMA | {"model_type": "gemma3_text", "head_dim": 4}
    old = gemma | {"rope_theta": 3e5, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8}}
    full, near = {"rope_type": "linear", "rope_theta": 3e5, "factor": 8}, {"rope_type": "default", "rope_theta": 2e4}
    new = gemma | {"rope_parameters": {"full_attention": full, "sliding_attention": near}}
    assert config_from(old) == config_from(new)


@pytest.mark.parametrize(
    ("given", "turned"), [({}, 1.2079), ({"attention_factor": 1.5}, 1.5), ({"mscale": 2, "mscale_all_dim": 1}, 1.4159 / 1.2079)],
    ids=["plain", "factor", "ratio"],
)  # fmt: skip
def test_yarn_warms_scores_as_asked(given, turned):
    """Queries and keys are multiplied by 0.1 ln 8 + 1 = 1.2079, which is ours too, or as told; 0.2 ln 8 + 1 = 1.4159."""
    scaling = {"rope_type": "yarn", "factor": 8, **given}
    config = config_from(LLAMA | {"max_position_embeddings": 64, "rope_scaling": scaling})
    scale = 2**-0.5 if config.score_scale is None else config.score_scale
    assert math.isclose(scale * 1.2079**2, turned**2 * 2**-0.5, rel_tol=1e-3)


def test_every_architecture_has_names_and_a_reader():
    assert TABLES.keys() == READERS.keys()


LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"type": "yarn", "beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096}


def keys(kind: str, layers: int, d_model: int, heads: int, d_ff: int, vocab: int, **rest) -> dict:
    return {
        "model_type": kind, "num_hidden_layers": layers, "hidden_size": d_model, "num_attention_heads": heads,
        "intermediate_size": d_ff, "vocab_size": vocab, **rest,
    }  # fmt: skip


# What the config.json in each repository says, of it what describes the computation.
PUBLISHED = {
    "bert-base": keys("bert", 12, 768, 12, 3072, 30_522, max_position_embeddings=512, type_vocab_size=2, layer_norm_eps=1e-12, hidden_act="gelu", architectures=["BertForMaskedLM"]),
    "deepseek-v2-lite": keys(
        "deepseek_v2", 27, 2048, 16, 10_944, 102_400, kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, moe_intermediate_size=1408, first_k_dense_replace=1, topk_method="greedy", n_group=1, topk_group=1, norm_topk_prob=False, routed_scaling_factor=1.0, rope_scaling=YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    "deepseek-v3": keys(
        "deepseek_v3", 61, 7168, 128, 18_432, 129_280, kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048, first_k_dense_replace=3, topk_method="noaux_tc", scoring_func="sigmoid", n_group=8, topk_group=4, norm_topk_prob=True, routed_scaling_factor=2.5, rope_scaling=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "gemma2-27b": keys("gemma2", 46, 4608, 32, 36_864, 256_000, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=144, sliding_window=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
    "gemma3-1b": keys("gemma3_text", 26, 1152, 4, 6912, 262_144, num_key_value_heads=1, head_dim=256, query_pre_attn_scalar=256, sliding_window=512, sliding_window_pattern=6, rope_theta=1_000_000, rope_local_base_freq=10_000),
    "gpt2-124m": {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50_257, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5},
    "llama3.1-8b": keys("llama", 32, 4096, 32, 14_336, 128_256, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=500_000.0, rope_scaling=LLAMA3 | {"factor": 8.0}, tie_word_embeddings=False),
    "llama3.2-1b": keys("llama", 16, 2048, 32, 8192, 128_256, num_key_value_heads=8, head_dim=64, rms_norm_eps=1e-5, rope_theta=500_000.0, rope_scaling=LLAMA3 | {"factor": 32.0}, tie_word_embeddings=True),
    "mistral-7b": keys("mistral", 32, 4096, 32, 14_336, 32_000, num_key_value_heads=8, rms_norm_eps=1e-5, sliding_window=4096),
    "mixtral-8x7b": keys("mixtral", 32, 4096, 32, 14_336, 32_000, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None, num_local_experts=8, num_experts_per_tok=2),
    "mpt-7b-alibi": {"model_type": "mpt", "d_model": 4096, "n_heads": 32, "n_layers": 32, "max_seq_len": 2048, "vocab_size": 50_432, "expansion_ratio": 4, "no_bias": True, "attn_config": {"alibi": True, "alibi_bias_max": 8, "clip_qkv": None, "qk_ln": False}},
    "pythia-70m": keys("gpt_neox", 6, 512, 8, 2048, 50_304, hidden_act="gelu", layer_norm_eps=1e-5, rotary_pct=0.25, rotary_emb_base=10_000, use_parallel_residual=True, tie_word_embeddings=False),
    "qwen2.5-7b": keys("qwen2", 28, 3584, 28, 18_944, 152_064, num_key_value_heads=4, rms_norm_eps=1e-6, rope_theta=1e6, use_sliding_window=False, sliding_window=131_072, max_window_layers=28),
    "qwen3-0.6b": keys("qwen3", 28, 1024, 16, 3072, 151_936, num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-6, rope_theta=1_000_000, tie_word_embeddings=True),
    "qwen3-30b-a3b": keys("qwen3_moe", 48, 2048, 32, 6144, 151_936, num_key_value_heads=4, head_dim=128, rms_norm_eps=1e-6, rope_theta=1e6, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[]),
    "smollm2-135m": keys("llama", 30, 576, 9, 1536, 49_152, num_key_value_heads=3, rms_norm_eps=1e-5, rope_theta=100_000, tie_word_embeddings=True),
    "smollm3-3b": keys("smollm3", 36, 2048, 16, 11_008, 128_256, num_key_value_heads=4, rms_norm_eps=1e-6, rope_theta=5_000_000.0, no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 9),
    "starcoderbase-15b": {"model_type": "gpt_bigcode", "n_embd": 6144, "n_head": 48, "n_inner": 24_576, "n_layer": 40, "n_positions": 8192, "vocab_size": 49_152, "multi_query": True, "activation_function": "gelu_pytorch_tanh"},
    "t5-small": {"model_type": "t5", "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "vocab_size": 32_128, "n_positions": 512, "layer_norm_epsilon": 1e-6},
    "t5-v1.1-small": {"model_type": "t5", "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "vocab_size": 32_128, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "layer_norm_epsilon": 1e-6},
}  # fmt: skip

TRAINING = ("max_len", "dropout", "init", "init_std", "label_smoothing", "z_loss", "balance_loss", "balance_rate")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configuration_is_our_preset(name):
    """But for the keys of training, and the longest sequence, of which config.json often has another idea."""
    read, ours = config_from(PUBLISHED[name]), preset(name)
    assert read.expert_size == ours.expert_size
    different = {
        field.name: (getattr(read, field.name), getattr(ours, field.name))
        for field in dataclasses.fields(ModelConfig)
        if field.name not in (*TRAINING, "d_expert", *(["d_ff"] if ours.n_experts and not ours.n_dense_layers else []))
        and getattr(read, field.name) != getattr(ours, field.name)
    }
    scale = different.pop("score_scale", (1.0, 1.0))
    assert math.isclose(*scale, rel_tol=1e-12)
    assert different == {}
