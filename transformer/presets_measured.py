"""Models that were never released but that published measurements name. What a family fixes: presets_families."""

from collections.abc import Mapping

from transformer.config import ModelConfig
from transformer.presets_families import decoder, gpt, maxtext_2023, maxtext_2024, megatron, pax, seqax

MEASURED: Mapping[str, ModelConfig] = {
    # Megatron-LM: Narayanan et al. 2021 (arXiv:2104.04473), table 1; 291B: the README of January 2021.
    "megatron-1.7b": megatron(24, 2304, 24),
    "megatron-3.6b": megatron(30, 3072, 32),
    "megatron-7.5b": megatron(36, 4096, 32),
    "megatron-18b": megatron(40, 6144, 48),
    "megatron-39b": megatron(48, 8192, 64),
    "megatron-76b": megatron(60, 10_240, 80),
    "megatron-145b": megatron(80, 12_288, 96),
    "megatron-291b": megatron(90, 16_384, 128),
    "megatron-310b": megatron(96, 16_384, 128),
    "megatron-530b": megatron(105, 20_480, 128),
    "megatron-1t": megatron(128, 25_600, 160),
    # Korthikanti et al. 2022 (arXiv:2205.05198), table 3. Its 175B, 530B and 1T are gpt3-175b and the two above.
    "megatron-22b": megatron(48, 6144, 64),
    # Megatron-LM's README of 2020: GPT-2 on up to 1,024 GPUs.
    "megatron-gpt2-1b": megatron(24, 1920, 15, max_len=1024),
    "megatron-gpt2-2b": megatron(30, 2304, 18, max_len=1024),
    "megatron-gpt2-4b": megatron(36, 3072, 24, max_len=1024),
    "megatron-gpt2-8b": megatron(42, 4096, 32, max_len=1024),
    # NeMo's and paxml's 5B (paxml, tasks/lm/params/nvidia.py: NVIDIA5B) and NeMo's 20B: model cards.
    "gpt3-5b": megatron(24, 4096, 32),
    "gpt3-20b": megatron(44, 6144, 48),
    # MaxText: README and configs, v4 at 1802b4b7d (1xv4-128.sh, 1xv4-384.sh), v5e at e47fa1b5 (largest_job/*.sh,
    # global_parameter_scale of base.yml), v5p at 93d120a92 (v5p/*.sh, likewise).
    "maxtext-v4-22b": maxtext_2023(48, 6144, 24, 24_576),
    "maxtext-v4-52b": maxtext_2023(32, 12_288, 32, 49_152),
    "maxtext-v5e-16b": maxtext_2023(32, 5120, 32, 32_768),
    "maxtext-v5e-32b": maxtext_2023(32, 10_240, 32, 32_768),
    "maxtext-v5e-64b": maxtext_2023(64, 10_240, 32, 32_768),
    "maxtext-v5e-128b": maxtext_2023(64, 10_240, 64, 65_536),
    "maxtext-v5p-32b": maxtext_2024(32, 8192, 64, 28_672),
    "maxtext-v5p-64b": maxtext_2024(64, 8192, 64, 28_672),
    "maxtext-v5p-128b": maxtext_2024(64, 8192, 128, 57_344),
    "maxtext-v5p-256b": maxtext_2024(64, 16_384, 128, 57_344),
    "maxtext-v5p-512b": maxtext_2024(128, 16_384, 128, 57_344),
    # nanotron: its benchmark script, whose counts of 1.34, 3.57, 8.86 and 80.0B these are; the small two are tied.
    "nanotron-1.34b": decoder(16, 2048, 32, 8192, vocab=131_072, max_len=4096, tied=True),
    "nanotron-3.57b": decoder(28, 3072, 32, 8192, vocab=131_072, max_len=4096, tied=True),
    "nanotron-8.86b": decoder(32, 4096, 32, 14_336, vocab=131_072, max_len=4096),
    "nanotron-80b": decoder(80, 8192, 64, 28_672, vocab=131_072, max_len=4096),
    # paxml, tasks/lm/params/c4.py: C4Spmd16BAdam32Replicas, C4Spmd32BAdam64Replicas.
    "pax-gpt-16b": pax(36, 6144, 48),
    "pax-gpt-32b": pax(40, 8192, 64),
    # Levanter: config/gpt2_1536.yaml and gpt2_20b.yaml, the ones of the sizes that its 1.0 release prints.
    "levanter-1.4b": gpt(48, 1536, 24, max_len=1024),
    "levanter-20b": gpt(44, 6144, 64, max_len=2048, bias=False, norm_bias=False),
    # seqax: configs/c4_a100x8_*.yaml and train.py.
    "seqax-84m": seqax(512, 8, 4096),
    "seqax-270m": seqax(1024, 16, 8192),
    "seqax-540m": seqax(2048, 16, 8192),
    "seqax-1b": seqax(2048, 16, 16_384),
    "seqax-2b": seqax(4096, 16, 16_384),
}
