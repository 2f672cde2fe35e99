"""Constructors for models that share a design: what the family fixes stands here, what a model adds in the tables."""

import math
from typing import Any

from transformer.config import ModelConfig


def decoder(
    layers: int, d_model: int, heads: int, d_ff: int, *, vocab: int, max_len: int,
    kv: int | None = None, d_head: int | None = None, **rest: Any,
) -> ModelConfig:  # fmt: skip
    """ModelConfig, with one kv head per head and heads that add up to d_model unless told otherwise."""
    return ModelConfig(
        n_layers=layers, d_model=d_model, n_heads=heads, n_kv_heads=kv or heads, d_head=d_head or d_model // heads,
        d_ff=d_ff, vocab_size=vocab, max_len=max_len, **rest,
    )  # fmt: skip


def gpt(layers: int, d_model: int, heads: int, *, max_len: int, vocab: int = 50_257, **rest: Any) -> ModelConfig:
    """GPT-2's: LayerNorm before each block, GELU, biases, learned positions, one table for both ends."""
    shared = {"position": "learned", "norm": "layer", "ffn": "gelu", "bias": True, "tied": True}
    return decoder(layers, d_model, heads, 4 * d_model, vocab=vocab, max_len=max_len, **shared | rest)


def megatron(layers: int, d_model: int, heads: int, *, max_len: int = 2048) -> ModelConfig:
    """GPT-2's, its vocabulary padded to 51,200 as Megatron-LM does for 8-way tensor parallelism, and counted so."""
    return gpt(layers, d_model, heads, max_len=max_len, vocab=51_200)


def transformer(d_model: int, heads: int, *, dropout: float) -> ModelConfig:
    """The original. Vocabulary: "about 37000" shared tokens (sec. 5.1). Tensor2Tensor's transformer_base gives
    what the paper leaves out: eps and the longest training sequence."""
    return decoder(
        6, d_model, heads, 4 * d_model, vocab=37_000, max_len=256, family="encoder_decoder",
        position="sinusoidal", norm="layer", norm_placement="post", norm_eps=1e-6, ffn="relu", bias=True,
        embed_scale=True, tied=True, init="xavier", dropout=dropout, label_smoothing=0.1,
    )  # fmt: skip


def bert(layers: int, d_model: int, heads: int) -> ModelConfig:
    """BERT uncased with its masked-token head; without the pooler, which next-sentence prediction alone used."""
    return decoder(
        layers, d_model, heads, 4 * d_model, vocab=30_522, max_len=512, family="encoder",
        position="learned", norm="layer", norm_placement="post", norm_eps=1e-12, ffn="gelu_exact", bias=True,
        embed_norm=True, token_types=2, tied=True, head_transform=True, head_bias=True,
        init="truncated", dropout=0.1,
    )  # fmt: skip


def t5(layers: int, d_model: int, heads: int, d_ff: int, *, d_head: int = 64, version: str = "1.0") -> ModelConfig:
    """T5. 1.0: ReLU, one table for all three ends, dropout; 1.1: GEGLU, a head of its own, no dropout."""
    own: dict[str, Any] = {
        "1.0": {"ffn": "relu", "tied": True, "logit_scale": d_model**-0.5, "dropout": 0.1},
        "1.1": {"ffn": "geglu"},
    }[version]
    return decoder(
        layers, d_model, heads, d_ff, d_head=d_head, vocab=32_128, max_len=512, family="encoder_decoder",
        score="dot", position="relative", norm_eps=1e-6, init="t5", z_loss=1e-4,
        **own,
    )  # fmt: skip


LLAMA: dict[str, dict[str, Any]] = {
    "1": {"vocab": 32_000, "max_len": 2048, "norm_eps": 1e-6},
    "2": {"vocab": 32_000, "max_len": 4096},
    "3": {"vocab": 128_256, "max_len": 8192, "rope_theta": 500_000.0},
}
LLAMA["3.1"] = LLAMA["3"] | {"max_len": 131_072, "rope_scaling": "llama3", "rope_factor": 8.0, "rope_trained_len": 8192}
LLAMA["3.2"] = LLAMA["3.1"] | {"rope_factor": 32.0, "tied": True}


def llama(layers: int, d_model: int, heads: int, kv: int, d_ff: int, *, version: str, **rest: Any) -> ModelConfig:
    """RMSNorm before each block, SwiGLU, rotary positions, no biases: all of which are ModelConfig's defaults."""
    return decoder(layers, d_model, heads, d_ff, kv=kv, **LLAMA[version] | rest)


def mistral(layers: int, d_model: int, heads: int, d_ff: int, **rest: Any) -> ModelConfig:
    """Llama's design with 8 kv heads. Mixtral's experts are weighted by a softmax over the chosen two."""
    return decoder(layers, d_model, heads, d_ff, kv=8, init="normal", **{"vocab": 32_000} | rest)


def qwen3(layers: int, d_model: int, heads: int, d_ff: int, *, kv: int = 8, **rest: Any) -> ModelConfig:
    """Llama's design with normalised queries and keys. config.json's 40,960 positions are the 32,768 that were
    trained on and room for an answer. Where all layers have experts, d_ff is that of one."""
    return decoder(
        layers, d_model, heads, d_ff, kv=kv, d_head=128, vocab=151_936, max_len=32_768,
        rope_theta=1e6, qk_norm=True, norm_eps=1e-6, init="normal", **rest,
    )  # fmt: skip


GEMMA = {
    "norm_placement": "sandwich", "norm_eps": 1e-6, "ffn": "geglu", "embed_scale": True, "tied": True, "init": "normal",
}  # fmt: skip


def gemma2(
    layers: int, d_model: int, heads: int, kv: int, d_ff: int, *, d_head: int = 256, score_scale: float | None = None
) -> ModelConfig:
    """Every other layer sees 4,096 positions; scores and logits are capped."""
    return decoder(
        layers, d_model, heads, d_ff, kv=kv, d_head=d_head, vocab=256_000, max_len=8192,
        score_scale=score_scale, score_cap=50.0, window=4096, global_every=2, logit_cap=30.0, **GEMMA,
    )  # fmt: skip


def gemma3(
    layers: int, d_model: int, heads: int, kv: int, d_ff: int, *, d_head: int = 256, score_scale: float | None = None
) -> ModelConfig:
    """The text model. Five of six layers see 1,024 positions, with a theta of their own; the sixth's rotation is
    stretched from the 32,768 positions of pre-training. The vocabulary has 64 rows for the vision tower's tokens."""
    return decoder(
        layers, d_model, heads, d_ff, kv=kv, d_head=d_head, vocab=262_208, max_len=131_072,
        score_scale=score_scale, qk_norm=True, window=1024, global_every=6, rope_theta=1e6, rope_theta_local=1e4,
        rope_scaling="linear", rope_factor=8.0, rope_trained_len=32_768, **GEMMA,
    )  # fmt: skip


DEEPSEEK_V2_SCALE = 192**-0.5 * ((0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1)) ** 2
"""V2 warms its scores by (0.0707 ln s + 1)^2 where YaRN itself, and V3, have (0.1 ln s + 1)^2 (V2, sec. 3.1.4)."""


def deepseek(layers: int, d_model: int, heads: int, d_ff: int, **rest: Any) -> ModelConfig:
    """Latent attention, many small experts and shared ones, the first layers dense. d_ff is of the dense layers."""
    return decoder(
        layers, d_model, heads, d_ff, d_head=192, kv_rank=512, d_rope=64, d_value=128,
        max_len=131_072, rope_scaling="yarn", rope_factor=40.0, rope_trained_len=4096, norm_eps=1e-6,
        init="normal", init_std=0.006, **rest,
    )  # fmt: skip


def nemotron(layers: int, d_model: int, heads: int, *, kv: int | None = None, init_std: float) -> ModelConfig:
    """LayerNorm, squared ReLU, half of each head rotates, no biases. init_std: NeMo's config of each size."""
    return decoder(
        layers, d_model, heads, 4 * d_model, kv=kv, vocab=256_000, max_len=4096,
        rope_fraction=0.5, norm="layer", ffn="relu2", init_std=init_std,
    )  # fmt: skip


def pythia(layers: int, d_model: int, heads: int, *, vocab: int = 50_304) -> ModelConfig:
    """GPT-NeoX's: parallel blocks with a norm each, a quarter of each head rotates. Its initial values are
    "small": std sqrt(2 / 5 d_model); maps back to the stream have 2 / (n_layers sqrt(d_model)), which our
    "residual" is near."""
    return decoder(
        layers, d_model, heads, 4 * d_model, vocab=vocab, max_len=2048, rope_fraction=0.25, norm="layer",
        parallel=True, parallel_norms=True, bias=True, ffn="gelu_exact", init_std=(0.4 / d_model) ** 0.5,
    )  # fmt: skip


def mpt(layers: int, d_model: int, heads: int, **rest: Any) -> ModelConfig:
    """llm-foundry's yamls: none asks for ALiBi, so positions are learned, and there are biases."""
    return gpt(layers, d_model, heads, **{"max_len": 2048, "vocab": 50_368, "ffn": "gelu_exact"} | rest)


def maxtext_2023(layers: int, d_model: int, heads: int, d_ff: int) -> ModelConfig:
    """MaxText's decoder of 2023: attention and feed-forward side by side after one RMSNorm, ReLU, heads of 256,
    one table for both ends and logits divided by sqrt(d_model). (What it divides out of the queries' initial
    values instead of the scores is the same.)"""
    return decoder(
        layers, d_model, heads, d_ff, d_head=256, vocab=32_768, max_len=2048, norm_eps=1e-6, parallel=True,
        ffn="relu", tied=True, logit_scale=d_model**-0.5, init="fan_in",
    )  # fmt: skip


def maxtext_2024(layers: int, d_model: int, heads: int, d_ff: int) -> ModelConfig:
    """MaxText's default of 2024 (`decoder_block: llama2`), heads of 128."""
    return decoder(layers, d_model, heads, d_ff, d_head=128, vocab=32_000, max_len=2048, init="fan_in")


def pax(layers: int, d_model: int, heads: int) -> ModelConfig:
    """Pax's C4 models: sinusoidal positions, capped scores and logits, one table. Its feed-forward alone has
    biases (0.002 % of the parameters), and learns a scale of each query dim: both left out."""
    return decoder(
        layers, d_model, heads, 4 * d_model, d_head=128, vocab=32_000, max_len=1024, score_cap=50.0,
        position="sinusoidal", norm="layer", norm_eps=1e-6, ffn="gelu", embed_scale=True, tied=True, logit_cap=30.0,
        init="normal", init_std=d_model**-0.5,
    )  # fmt: skip


def seqax(d_model: int, heads: int, d_ff: int) -> ModelConfig:
    """seqax's c4_a100x8 configs: Llama's design, 8 layers."""
    return decoder(8, d_model, heads, d_ff, d_head=128, vocab=32_768, max_len=1024, norm_eps=1e-6, init="fan_in")
