"""Configurations of Hugging Face transformers as ours, by config.json's `model_type`.

Keys of the shape and the computation are read; those of training (initial values, dropout, losses) are ours to choose,
so `ModelConfig`'s defaults stay.
"""

from collections.abc import Callable, Mapping
from typing import Any

from transformer.config import ModelConfig
from transformer.errors import RequestError, nearest
from transformer.interop.keys import (
    GATED,
    PLAIN,
    Json,
    Keys,
    activation,
    defaults,
    expect,
    get,
    local,
    need,
    rope,
    window,
)  # fmt: skip


def config_from(hf_config: Json) -> ModelConfig:
    """The model that a config.json describes. RequestError names what we do not know or cannot compute.

    >>> shape = dict(hidden_size=8, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=37)
    >>> config_from({"model_type": "llama", "rope_theta": 5e5, **shape}).rope_theta
    500000.0
    >>> config_from({"model_type": "llama", "attention_bias": True, **shape})
    Traceback (most recent call last):
    transformer.errors.RequestError: llama with attention_bias=True cannot be computed; expected False
    """
    kind = str(hf_config.get("model_type"))
    if kind not in READERS:
        raise RequestError(f"config.json's model_type={kind!r} is unknown: {nearest(kind, READERS)}")
    return ModelConfig(**READERS[kind](hf_config))


def _like_llama(c: Json, known: Mapping[str, str] = GATED) -> Keys:
    """Keys as Llama names them, with its class's defaults; `known` are the non-linearities."""
    expect(c, attention_bias=False, mlp_bias=False)
    d_model, n_heads = need(c, "hidden_size"), need(c, "num_attention_heads")
    d_head = get(c, "head_dim", d_model // n_heads)
    return {
        "n_layers": need(c, "num_hidden_layers"),
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": get(c, "num_key_value_heads", n_heads),
        "d_head": d_head,
        "d_ff": need(c, "intermediate_size"),
        "vocab_size": need(c, "vocab_size"),
        "max_len": get(c, "max_position_embeddings", 2048),
        "norm_eps": get(c, "rms_norm_eps", 1e-6),
        "tied": get(c, "tie_word_embeddings", False),
        "ffn": activation(c, "hidden_act", "silu", known),
        **rope(c, d_head),
    }


def _mistral(c: Json) -> Keys:
    keys = _like_llama(defaults(c, num_key_value_heads=8))
    return keys | window(c, local(c, lambda _: True), c.get("sliding_window", 4096))


def _mixtral(c: Json) -> Keys:
    keys = _like_llama(defaults(c, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1e6))
    experts = {"n_experts": get(c, "num_local_experts", 8), "experts_per_token": get(c, "num_experts_per_tok", 2)}
    return keys | experts | window(c, local(c, lambda _: True), c.get("sliding_window"))


def _qwen_window(c: Json) -> Keys:
    if not get(c, "use_sliding_window", False):
        return {}
    first = get(c, "max_window_layers", 28)
    return window(c, local(c, lambda i: i >= first), get(c, "sliding_window", 4096))


def _qwen2(c: Json) -> Keys:
    return _like_llama(defaults(c, max_position_embeddings=32_768)) | {"qkv_bias": True} | _qwen_window(c)


def _qwen3(c: Json) -> Keys:
    keys = _like_llama(defaults(c, head_dim=128, max_position_embeddings=32_768))
    return keys | {"qk_norm": True} | _qwen_window(c)


def _qwen3_moe(c: Json) -> Keys:
    expect(c, use_sliding_window=False)
    n_layers, dense = need(c, "num_hidden_layers"), sorted(get(c, "mlp_only_layers", []))
    if dense != list(range(len(dense))) or len(dense) >= n_layers:
        raise RequestError(f"qwen3_moe with mlp_only_layers={dense} cannot be computed; expected the first few")
    return _like_llama(defaults(c, num_key_value_heads=4, max_position_embeddings=32_768)) | {
        "qk_norm": True,
        "n_experts": get(c, "num_experts", get(c, "num_local_experts", 128)),
        "experts_per_token": get(c, "num_experts_per_tok", 8),
        "d_expert": get(c, "moe_intermediate_size", 768),
        "moe_every": get(c, "decoder_sparse_step", 1),
        "n_dense_layers": len(dense) or None,
        "router_normalize": get(c, "norm_topk_prob", False),
    }


def _smollm3(c: Json) -> Keys:
    expect(c, use_sliding_window=False)
    every, n_layers = get(c, "no_rope_layer_interval", 4), need(c, "num_hidden_layers")
    pattern = [int((i + 1) % every != 0) for i in range(n_layers)]
    expect(c, no_rope_layers=pattern)
    keys = _like_llama(defaults(c, num_key_value_heads=4, tie_word_embeddings=True, rope_theta=2e6))
    return keys | ({"no_rope_every": every} if every <= n_layers else {})


GEMMA: Keys = {"head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True}


def _gemma(c: Json) -> Keys:
    expect(c, use_bidirectional_attention=False)
    # Files of Gemma 1 say "gelu" and mean its tanh form (configuration_gemma.py).
    return _like_llama(defaults({**c, "hidden_act": "gelu_pytorch_tanh"}, **GEMMA)) | {"embed_scale": True}


def _gemma_sandwich(c: Json) -> Keys:
    expect(c, use_bidirectional_attention=False)
    act = get(c, "hidden_activation", "gelu_pytorch_tanh")
    keys = _like_llama(defaults({**c, "hidden_act": act}, num_key_value_heads=4, **GEMMA))
    scalar = get(c, "query_pre_attn_scalar", 256)
    scale = {} if scalar == keys["d_head"] else {"score_scale": scalar**-0.5}
    return keys | scale | {"embed_scale": True, "norm_placement": "sandwich"}


def _gemma2(c: Json) -> Keys:
    return _gemma_sandwich(c) | {
        "score_cap": c.get("attn_logit_softcapping", 50.0),
        "logit_cap": c.get("final_logit_softcapping", 30.0),
        **window(c, local(c, lambda i: i % 2 == 0), c.get("sliding_window", 4096)),
    }


def _gemma3(c: Json) -> Keys:
    every = get(c, "sliding_window_pattern", get(c, "_sliding_window_pattern", 6))
    near = {**c, "rope_theta": c.get("rope_local_base_freq"), "rope_scaling": None}
    turning = rope(near, 1, "sliding_attention")
    if turning.get("rope_scaling", "none") != "none":
        raise RequestError("gemma3_text with scaled rope in its local layers cannot be computed; expected 'default'")
    return _gemma_sandwich(defaults(c, rope_theta=1e6)) | {
        "qk_norm": True,
        "rope_theta_local": turning["rope_theta"],
        "score_cap": c.get("attn_logit_softcapping"),
        "logit_cap": c.get("final_logit_softcapping"),
        **window(c, local(c, lambda i: (i + 1) % every != 0), c.get("sliding_window", 4096)),
    }


def _deepseek(c: Json) -> Keys:
    # Norms of the latents have this eps whatever config.json says (modeling_deepseek_v3.py).
    expect(c, rms_norm_eps=1e-6, moe_layer_freq=1, rope_interleave=True)
    still, turning = get(c, "qk_nope_head_dim", 128), get(c, "qk_rope_head_dim", 64)
    keys = _like_llama({**c, "kv_lora_rank": get(c, "kv_lora_rank", 512), "head_dim": still + turning})
    return keys | {
        "n_kv_heads": keys["n_heads"],
        "kv_rank": get(c, "kv_lora_rank", 512),
        "q_rank": c.get("q_lora_rank", 1536),
        "d_rope": turning,
        "d_value": get(c, "v_head_dim", 128),
        "experts_per_token": need(c, "num_experts_per_tok"),
        "d_expert": need(c, "moe_intermediate_size"),
    }


def _deepseek_v2(c: Json) -> Keys:
    expect(c, norm_topk_prob=False, scoring_func="softmax", topk_method=("greedy", "group_limited_greedy"))
    groups = {}
    if c.get("topk_method") == "group_limited_greedy":
        groups = {"router_groups": need(c, "n_group"), "router_top_groups": need(c, "topk_group")}
    return _deepseek(c) | groups | {
        "n_experts": get(c, "n_routed_experts", 64),
        "n_shared_experts": get(c, "n_shared_experts", 2),
        "n_dense_layers": get(c, "first_k_dense_replace", 0) or None,
        "router_normalize": False,
        "router_scale": get(c, "routed_scaling_factor", 1.0),
    }  # fmt: skip


def _deepseek_v3(c: Json) -> Keys:
    """Its experts' bias in the choice is there in ours where training moves it, at the rate of the paper (sec. 4.2)."""
    expect(c, scoring_func="sigmoid", topk_method="noaux_tc")
    return _deepseek(c) | {
        "n_experts": get(c, "n_routed_experts", 256),
        "n_shared_experts": get(c, "n_shared_experts", 1),
        "n_dense_layers": get(c, "first_k_dense_replace", 3) or None,
        "router": "sigmoid",
        "router_normalize": get(c, "norm_topk_prob", True),
        "router_scale": get(c, "routed_scaling_factor", 2.5),
        "router_groups": get(c, "n_group", 8),
        "router_top_groups": get(c, "topk_group", 4),
        "balance_rate": 0.001,
    }


def _nemotron(c: Json) -> Keys:
    keys = defaults(c, hidden_act="relu2", max_position_embeddings=4096, partial_rotary_factor=0.5)
    return _like_llama(keys, PLAIN) | {"norm": "layer", "norm_eps": get(c, "norm_eps", 1e-5)}


def _cohere(c: Json) -> Keys:
    expect(c, use_qk_norm=False)
    return _like_llama(defaults(c, tie_word_embeddings=True, max_position_embeddings=8192, rope_theta=5e5)) | {
        "norm": "layer",
        "norm_bias": False,
        "norm_eps": get(c, "layer_norm_eps", 1e-5),
        "parallel": True,
        "logit_scale": get(c, "logit_scale", 0.0625),
    }


def _like_gpt(c: Json, names: str, *, inner: str | None, **rest: Any) -> Keys:
    """LayerNorm and a plain feed-forward; `names` of layers, width, heads and longest sequence."""
    layers, width, heads, *length = names.split()
    d_model, n_heads = need(c, width), need(c, heads)
    return {
        "n_layers": need(c, layers),
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": n_heads,
        "d_head": d_model // n_heads,
        "d_ff": get(c, inner, 4 * d_model) if inner else 4 * d_model,
        "vocab_size": need(c, "vocab_size"),
        "max_len": get(c, length[0], 2048) if length else 2048,
        "norm": "layer",
        "norm_eps": get(c, "layer_norm_epsilon", 1e-5),
        "tied": get(c, "tie_word_embeddings", True),
        **rest,
    }


def _gpt2(c: Json, act: str = "gelu_new") -> Keys:
    expect(c, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    names = "n_layer n_embd n_head n_positions"
    ffn = activation(c, "activation_function", act, PLAIN)
    c = defaults(c, n_positions=1024)
    return _like_gpt(c, names, inner="n_inner", bias=True, position="learned", ffn=ffn)


def _gpt_bigcode(c: Json) -> Keys:
    keys = _gpt2(c, act="gelu_pytorch_tanh")
    return keys | {"n_kv_heads": 1 if get(c, "multi_query", True) else keys["n_heads"]}


def _gpt_neox(c: Json) -> Keys:
    expect(c, attention_bias=True)
    names = "num_hidden_layers hidden_size num_attention_heads max_position_embeddings"
    ffn = activation(c, "hidden_act", "gelu", PLAIN)
    both = get(c, "use_parallel_residual", True)
    keys = _like_gpt(
        defaults(c, tie_word_embeddings=False), names, inner="intermediate_size", bias=True, ffn=ffn, parallel=both,
        parallel_norms=both,
    ) | {"norm_eps": get(c, "layer_norm_eps", 1e-5)}  # fmt: skip
    turning = {"rope_theta": c.get("rotary_emb_base"), "partial_rotary_factor": get(c, "rotary_pct", 0.25)}
    return keys | rope(defaults(c, **turning), keys["d_head"])


def _falcon(c: Json) -> Keys:
    expect(c, alibi=False)
    names = "num_hidden_layers hidden_size num_attention_heads max_position_embeddings"
    ffn, bias = activation(c, "activation", "gelu", PLAIN), get(c, "bias", False)
    keys = _like_gpt(c, names, inner="ffn_hidden_size", bias=bias, ffn=ffn)
    new = get(c, "new_decoder_architecture", False)
    if new:
        keys["n_kv_heads"] = get(c, "num_kv_heads", keys["n_heads"])
        keys["parallel_norms"] = get(c, "num_ln_in_parallel_attn", 2) == 2
    elif get(c, "multi_query", True):
        keys["n_kv_heads"] = 1
    return keys | {"parallel": new or get(c, "parallel_attn", True)} | rope(c, keys["d_head"])


def _bloom(c: Json) -> Keys:
    expect(c, apply_residual_connection_post_layernorm=False)
    c = defaults(c, hidden_size=c.get("n_embed"), n_head=c.get("num_attention_heads"))  # names of older files
    rest = {"bias": True, "position": "alibi", "ffn": "gelu", "embed_norm": True}
    return _like_gpt(c, "n_layer hidden_size n_head seq_length", inner=None, **rest)


def _mpt(c: Json) -> Keys:
    expect(c, no_bias=True, logit_scale=None, expansion_ratio=4)
    inner = {"model_type": "mpt's attn_config", **get(c, "attn_config", {})}
    expect(
        inner, alibi=True, alibi_bias_max=8, clip_qkv=None, qk_ln=False, softmax_scale=None, prefix_lm=False,
        attn_type="multihead_attention",
    )  # fmt: skip
    rest = {"position": "alibi", "ffn": "gelu_exact", "norm_bias": False}
    return _like_gpt(c, "n_layers d_model n_heads max_seq_len", inner=None, **rest)


def _bert(c: Json) -> Keys:
    """With its masked-token head, or `BertModel` without one."""
    expect(c, is_decoder=False, position_embedding_type="absolute", tie_word_embeddings=True)
    head = get(c, "architectures", ["BertForMaskedLM"])[0] != "BertModel"
    names = "num_hidden_layers hidden_size num_attention_heads max_position_embeddings"
    keys = _like_gpt(defaults(c, max_position_embeddings=512), names, inner="intermediate_size", bias=True)
    return keys | {
        "family": "encoder",
        "norm_placement": "post",
        "norm_eps": get(c, "layer_norm_eps", 1e-12),
        "position": "learned",
        "token_types": get(c, "type_vocab_size", 2),
        "embed_norm": True,
        "ffn": activation(c, "hidden_act", "gelu", PLAIN),
        "head_transform": head,
        "head_bias": head,
    }


def _t5(c: Json) -> Keys:
    """1.0, or 1.1: `tie_word_embeddings` tells them apart, in files of transformers 5 `scale_decoder_outputs`."""
    known = {"relu": "relu", "gated-gelu": "geglu", "gated-silu": "swiglu"}
    expect(c, num_decoder_layers=(need(c, "num_layers"),))
    tied = get(c, "scale_decoder_outputs", get(c, "tie_word_embeddings", True))
    return {
        "family": "encoder_decoder",
        "n_layers": c["num_layers"],
        "d_model": need(c, "d_model"),
        "n_heads": need(c, "num_heads"),
        "n_kv_heads": c["num_heads"],
        "d_head": need(c, "d_kv"),
        "d_ff": need(c, "d_ff"),
        "vocab_size": need(c, "vocab_size"),
        "max_len": get(c, "n_positions", 512),
        "score": "dot",
        "position": "relative",
        "relative_buckets": get(c, "relative_attention_num_buckets", 32),
        "relative_distance": get(c, "relative_attention_max_distance", 128),
        "norm_eps": get(c, "layer_norm_epsilon", 1e-6),
        "ffn": activation(c, "feed_forward_proj", "relu", known),
        "tied": tied,
        "logit_scale": c["d_model"] ** -0.5 if tied else None,
    }


def _marian(c: Json) -> Keys:
    layers, heads, d_ff = (need(c, f"encoder_{name}") for name in ("layers", "attention_heads", "ffn_dim"))
    expect(
        c, decoder_layers=layers, decoder_attention_heads=heads, decoder_ffn_dim=d_ff,
        decoder_vocab_size=need(c, "vocab_size"), share_encoder_decoder_embeddings=True, tie_word_embeddings=True,
        normalize_before=False, normalize_embedding=False, add_final_layer_norm=False,
    )  # fmt: skip
    names = "encoder_layers d_model encoder_attention_heads max_position_embeddings"
    return _like_gpt(c, names, inner="encoder_ffn_dim", bias=True, position="sinusoidal", norm_placement="post") | {
        "family": "encoder_decoder",
        "ffn": activation(c, "activation_function", "gelu", PLAIN),
        "embed_scale": get(c, "scale_embedding", False),
        "head_bias": True,
    }


READERS: Mapping[str, Callable[[Json], Keys]] = {
    "bert": _bert,
    "bloom": _bloom,
    "cohere": _cohere,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "falcon": _falcon,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
    "gpt_bigcode": _gpt_bigcode,
    "gpt_neox": _gpt_neox,
    "llama": _like_llama,
    "marian": _marian,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "mpt": _mpt,
    "nemotron": _nemotron,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "smollm3": _smollm3,
    "t5": _t5,
}
