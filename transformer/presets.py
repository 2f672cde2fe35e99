"""The published models by name, each with its source. Those that only tables of measurements name: presets_measured."""

from collections.abc import Mapping
from dataclasses import replace

from transformer.config import ModelConfig, override
from transformer.errors import RequestError, nearest
from transformer.presets_families import (
    DEEPSEEK_V2_SCALE,
    GEMMA,
    bert,
    decoder,
    deepseek,
    gemma2,
    gemma3,
    gpt,
    llama,
    mistral,
    mpt,
    nemotron,
    pythia,
    qwen3,
    t5,
    transformer,
)  # fmt: skip
from transformer.presets_measured import MEASURED

PUBLISHED: Mapping[str, ModelConfig] = {
    # Ours: small enough for two CPU cores, every dim divisible by 8 so that every mesh axis fits it.
    "tiny": decoder(8, 128, 8, 384, vocab=264, max_len=256, vocab_multiple=8, tied=True),
    # Transformer: Vaswani et al. 2017 (arXiv:1706.03762), table 3. Its 65M and 213M parameters fit no one vocabulary:
    # base would need 40,700 rows and big 35,800. We have 63.1M and 214.2M; what the attention maps' biases add is
    # below 0.1 %.
    "transformer-base": transformer(512, 8, dropout=0.1),
    "transformer-big": transformer(1024, 16, dropout=0.3),
    # BERT: Devlin et al. 2018 (arXiv:1810.04805), sec. 3, and the released bert_config.json.
    "bert-base": bert(12, 768, 12),
    "bert-large": bert(24, 1024, 16),
    # T5: Raffel et al. 2020 (arXiv:1910.10683), sec. 3.7; T5.1.1: the released t5.1.1.*.gin and config.json.
    # z_loss: the gin files of both.
    "t5-small": t5(6, 512, 8, 2048),
    "t5-base": t5(12, 768, 12, 3072),
    "t5-large": t5(24, 1024, 16, 4096),
    "t5-3b": t5(24, 1024, 32, 16_384, d_head=128),
    "t5-11b": t5(24, 1024, 128, 65_536, d_head=128),
    "t5-v1.1-small": t5(8, 512, 6, 1024, version="1.1"),
    "t5-v1.1-base": t5(12, 768, 12, 2048, version="1.1"),
    "t5-v1.1-large": t5(24, 1024, 16, 2816, version="1.1"),
    "t5-v1.1-xl": t5(24, 2048, 32, 5120, version="1.1"),
    "t5-v1.1-xxl": t5(24, 4096, 64, 10_240, version="1.1"),
    # GPT-2: Radford et al. 2019, table 2, and the released weights (openai/gpt-2).
    "gpt2-124m": gpt(12, 768, 12, max_len=1024),
    "gpt2-350m": gpt(24, 1024, 16, max_len=1024),
    "gpt2-774m": gpt(36, 1280, 20, max_len=1024),
    "gpt2-1.5b": gpt(48, 1600, 25, max_len=1024),
    # GPT-3: Brown et al. 2020 (arXiv:2005.14165), table 2.1; parameter counts in table D.1. Two rows of table 2.1
    # contradict themselves and D.1: "XL" prints 24 heads of 128 for d_model 2048 (16 x 128 is meant, as
    # 1,320M parameters need), and "13B" prints d_model 5140 for 40 heads of 128 (5120). The paper's alternating
    # banded attention is left out: its band is not published, and it changes no parameter.
    "gpt3-125m": gpt(12, 768, 12, max_len=2048),
    "gpt3-350m": gpt(24, 1024, 16, max_len=2048),
    "gpt3-760m": gpt(24, 1536, 16, max_len=2048),
    "gpt3-1.3b": gpt(24, 2048, 16, max_len=2048),
    "gpt3-2.7b": gpt(32, 2560, 32, max_len=2048),
    "gpt3-6.7b": gpt(32, 4096, 32, max_len=2048),
    "gpt3-13b": gpt(40, 5120, 40, max_len=2048),
    "gpt3-175b": gpt(96, 12_288, 96, max_len=2048),
    # PaLM: Chowdhery et al. 2022 (arXiv:2204.02311), table 1 and secs. 2, 5; d_ff is 4 d_model, heads are of 256.
    "palm-540b": decoder(
        118, 18_432, 48, 73_728, kv=1, d_head=256, vocab=256_000, max_len=2048, norm="layer", norm_bias=False,
        norm_eps=1e-6, parallel=True, tied=True, logit_scale=18_432**-0.5, init="fan_in", z_loss=1e-4,
    ),
    # BLOOM: Le Scao et al. 2022 (arXiv:2211.05100), table 3; 250,680 tokens padded and counted as 250,880 rows.
    # init_std: bigscience's tr11-176B-ml.slurm.
    "bloom-176b": gpt(
        70, 14_336, 112, max_len=2048, vocab=250_880, position="alibi", embed_norm=True, init_std=0.0048,
    ),
    # BloombergGPT: Wu et al. 2023 (arXiv:2303.17564), table 4 and app. A: std sqrt(1 / 3 d_model).
    "bloomberggpt-50b": gpt(
        70, 7680, 40, max_len=2048, vocab=131_072, position="alibi", embed_norm=True, init_std=(3 * 7680) ** -0.5,
    ),
    # Pythia: Biderman et al. 2023 (arXiv:2304.01373), table 1, and config.json; vocabularies padded as for tensor
    # parallelism, so the two largest differ.
    "pythia-70m": pythia(6, 512, 8),
    "pythia-160m": pythia(12, 768, 12),
    "pythia-410m": pythia(24, 1024, 16),
    "pythia-1b": pythia(16, 2048, 8),
    "pythia-1.4b": pythia(24, 2048, 16),
    "pythia-2.8b": pythia(32, 2560, 32),
    "pythia-6.9b": pythia(32, 4096, 32, vocab=50_432),
    "pythia-12b": pythia(36, 5120, 40, vocab=50_688),
    # StarCoder: Li et al. 2023 (arXiv:2305.06161), sec. 5, and config.json.
    "starcoderbase-15b": gpt(40, 6144, 48, kv=1, max_len=8192, vocab=49_152),
    # Falcon: Almazrouei et al. 2023 (arXiv:2311.16867), config.json and model card. Its head is not tied.
    "falcon-180b": decoder(
        80, 14_848, 232, 59_392, kv=8, vocab=65_024, max_len=2048, norm="layer", parallel=True, parallel_norms=True,
        ffn="gelu_exact", init="normal", z_loss=1e-4,
    ),
    # MPT: mosaicml/llm-foundry, scripts/train/yamls/pretrain at 8c8dd48, which is what its benchmarks ran. The
    # weights released as MPT-7B and MPT-30B (config.json) have ALiBi and no biases instead.
    "mpt-125m": mpt(12, 768, 12),
    "mpt-350m": mpt(24, 1024, 16),
    "mpt-760m": mpt(24, 1536, 12),
    "mpt-1b": mpt(24, 2048, 16),
    "mpt-3b": mpt(32, 2560, 20),
    "mpt-7b": mpt(32, 4096, 32),
    "mpt-13b": mpt(40, 5120, 40),
    "mpt-30b": mpt(48, 7168, 56),
    "mpt-70b": mpt(80, 8192, 64),
    "mpt-7b-alibi": mpt(32, 4096, 32, vocab=50_432, position="alibi", bias=False, norm_bias=False),
    "mpt-30b-alibi": mpt(48, 7168, 56, max_len=8192, vocab=50_432, position="alibi", bias=False, norm_bias=False),
    # Llama 1: Touvron et al. 2023 (arXiv:2302.13971), table 2, and the released params.json.
    "llama1-7b": llama(32, 4096, 32, 32, 11_008, version="1"),
    "llama1-13b": llama(40, 5120, 40, 40, 13_824, version="1"),
    "llama1-33b": llama(60, 6656, 52, 52, 17_920, version="1"),
    "llama1-65b": llama(80, 8192, 64, 64, 22_016, version="1", norm_eps=1e-5),
    # Llama 2: Touvron et al. 2023 (arXiv:2307.09288) and the released params.json. 34B was not released: the dims
    # are Code Llama 34B's (params.json; its theta of 1e6 and 16,384 positions are of the further training on code).
    "llama2-7b": llama(32, 4096, 32, 32, 11_008, version="2"),
    "llama2-13b": llama(40, 5120, 40, 40, 13_824, version="2"),
    "llama2-34b": llama(48, 8192, 64, 8, 22_016, version="2"),
    "llama2-70b": llama(80, 8192, 64, 8, 28_672, version="2"),
    # Llama 3: Grattafiori et al. 2024 (arXiv:2407.21783), table 3; 3.1 and 3.2: the released params.json and
    # config.json. Weights of 405B for 16-way tensor parallelism hold each kv head twice (n_kv_heads=16).
    "llama3-8b": llama(32, 4096, 32, 8, 14_336, version="3"),
    "llama3-70b": llama(80, 8192, 64, 8, 28_672, version="3"),
    "llama3-405b": llama(126, 16_384, 128, 8, 53_248, version="3"),
    "llama3.1-8b": llama(32, 4096, 32, 8, 14_336, version="3.1"),
    "llama3.1-70b": llama(80, 8192, 64, 8, 28_672, version="3.1"),
    "llama3.1-405b": llama(126, 16_384, 128, 8, 53_248, version="3.1"),
    "llama3.2-1b": llama(16, 2048, 32, 8, 8192, version="3.2"),
    "llama3.2-3b": llama(28, 3072, 24, 8, 8192, version="3.2"),
    # Mistral 7B: Jiang et al. 2023 (arXiv:2310.06825), table 1. Mixtral: Jiang et al. 2024 (arXiv:2401.04088),
    # table 1, and config.json of v0.1 (balance_loss: its router_aux_loss_coef).
    "mistral-7b": mistral(32, 4096, 32, 14_336, max_len=8192, window=4096),
    "mixtral-8x7b": mistral(
        32, 4096, 32, 14_336, max_len=32_768, rope_theta=1e6, n_experts=8, experts_per_token=2, balance_loss=0.02,
    ),
    "mixtral-8x22b": mistral(
        56, 6144, 48, 16_384, max_len=65_536, rope_theta=1e6, n_experts=8, experts_per_token=2, balance_loss=0.001,
    ),
    # SmolLM2: Allal et al. 2025 (arXiv:2502.02737), config.json. SmolLM3: config.json.
    "smollm2-135m": llama(
        30, 576, 9, 3, 1536, version="2", vocab=49_152, max_len=8192, rope_theta=1e5, tied=True,
        init="normal", init_std=576**-0.5,
    ),
    "smollm3-3b": llama(
        36, 2048, 16, 4, 11_008, version="3", max_len=65_536, rope_theta=5e6, no_rope_every=4, norm_eps=1e-6, tied=True,
        init="normal",
    ),
    # Qwen2.5: Yang et al. 2024 (arXiv:2412.15115), table 1, and config.json; trained on 32,768 positions (sec. 3.3).
    "qwen2.5-7b": decoder(
        28, 3584, 28, 18_944, kv=4, vocab=152_064, max_len=32_768, rope_theta=1e6, norm_eps=1e-6, qkv_bias=True,
        init="normal",
    ),
    # Qwen3: Yang et al. 2025 (arXiv:2505.09388), tables 1 and 2, and config.json.
    "qwen3-0.6b": qwen3(28, 1024, 16, 3072, tied=True),
    "qwen3-1.7b": qwen3(28, 2048, 16, 6144, tied=True),
    "qwen3-4b": qwen3(36, 2560, 32, 9728, tied=True),
    "qwen3-8b": qwen3(36, 4096, 32, 12_288),
    "qwen3-14b": qwen3(40, 5120, 40, 17_408),
    "qwen3-32b": qwen3(64, 5120, 64, 25_600),
    "qwen3-30b-a3b": qwen3(48, 2048, 32, 768, kv=4, n_experts=128, experts_per_token=8, balance_loss=0.001),
    "qwen3-235b-a22b": qwen3(94, 4096, 64, 1536, kv=4, n_experts=128, experts_per_token=8, balance_loss=0.001),
    # Gemma 2: arXiv:2408.00118, table 1, and config.json. Scores of 27B are divided by sqrt(d_model / n_heads).
    "gemma2-2b": gemma2(26, 2304, 8, 4, 9216),
    "gemma2-9b": gemma2(42, 3584, 16, 8, 14_336),
    "gemma2-27b": gemma2(46, 4608, 32, 16, 36_864, d_head=128, score_scale=144**-0.5),
    # Gemma 3: arXiv:2503.19786, table 1 and sec. 2, and config.json. 1B has no vision tower and 32,768 positions.
    "gemma3-1b": decoder(
        26, 1152, 4, 6912, kv=1, d_head=256, vocab=262_144, max_len=32_768, qk_norm=True, window=512, global_every=6,
        rope_theta=1e6, rope_theta_local=1e4, **GEMMA,
    ),
    "gemma3-4b": gemma3(34, 2560, 8, 4, 10_240),
    "gemma3-12b": gemma3(48, 3840, 16, 8, 15_360),
    "gemma3-27b": gemma3(62, 5376, 32, 16, 21_504, d_head=128, score_scale=168**-0.5),
    # DeepSeek-V2: arXiv:2405.04434, sec. 3.1.2, Lite: app. B; config.json. balance_loss is the expert-level one; those
    # by device, and the dropping of tokens by device, are left out.
    "deepseek-v2": deepseek(
        60, 5120, 128, 12_288, vocab=102_400, q_rank=1536, n_experts=160, experts_per_token=6, d_expert=1536,
        n_shared_experts=2, n_dense_layers=1, router_normalize=False, router_scale=16.0, router_groups=8,
        router_top_groups=3, balance_loss=0.003, score_scale=DEEPSEEK_V2_SCALE,
    ),
    "deepseek-v2-lite": deepseek(
        27, 2048, 16, 10_944, vocab=102_400, n_experts=64, experts_per_token=6, d_expert=1408, n_shared_experts=2,
        n_dense_layers=1, router_normalize=False, balance_loss=0.001, score_scale=DEEPSEEK_V2_SCALE,
    ),
    # DeepSeek-V3: arXiv:2412.19437, sec. 4.2, and config.json; without the multi-token prediction module.
    "deepseek-v3": deepseek(
        61, 7168, 128, 18_432, vocab=129_280, q_rank=1536, n_experts=256, experts_per_token=8, d_expert=2048,
        n_shared_experts=1, n_dense_layers=3, router="sigmoid", router_scale=2.5, router_groups=8,
        router_top_groups=4, balance_loss=1e-4, balance_rate=0.001,
    ),
    # Grok-1: xai-org/grok-1, run.py and model.py. "314B" leaves out the embedding: 314.9B in the layers.
    "grok1-314b": decoder(
        64, 6144, 48, 32_768, kv=8, vocab=131_072, max_len=8192, score_cap=30.0, norm_placement="sandwich", ffn="geglu",
        n_experts=8, experts_per_token=2, router_normalize=False, embed_scale=True, tied=True, logit_scale=3**-0.5,
    ),
    # Nemotron-4 15B: Parmar et al. 2024 (arXiv:2402.16819), table 1; 340B: arXiv:2406.11704, table 1. Nemotron-3 8B:
    # its model card; 22B: NeMo, collections/llm/gpt/model/nemotron.py.
    "nemotron-8b": nemotron(32, 4096, 32, init_std=0.01),
    "nemotron-22b": nemotron(40, 6144, 48, init_std=0.008),
    "nemotron4-15b": nemotron(32, 6144, 48, kv=8, init_std=0.0134),
    "nemotron4-340b": nemotron(96, 18_432, 96, kv=8, init_std=0.0063),
    # MT-NLG: Smith et al. 2022 (arXiv:2201.11990), sec. 3.2; Megatron-LM's 530B with its own initial values.
    "mt-nlg-530b": replace(MEASURED["megatron-530b"], init_std=0.004),
}  # fmt: skip

PRESETS: Mapping[str, ModelConfig] = {**PUBLISHED, **MEASURED}


def preset(name: str, overrides: Mapping[str, str] | None = None) -> ModelConfig:
    """A published model by its slug, with keys replaced as the command line gives them.

    >>> preset("tiny", {"n_layers": "2"}).n_layers
    2
    """
    if name not in PRESETS:
        raise RequestError(f"unknown preset {name!r}: {nearest(name, PRESETS)}")
    return override(PRESETS[name], overrides or {})
