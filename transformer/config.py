"""What a model is: one frozen description, and the published ones by name, each with its source."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from transformer.errors import RequestError, nearest

Remat = Literal["none", "dots", "full"]
Precision = Literal["bf16", "f32"]
AttentionBackend = Literal["auto", "xla", "cudnn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only Transformer.

    >>> shape = dict(d_model=8, n_heads=2, n_kv_heads=1, d_head=4, d_ff=32)
    >>> ModelConfig(n_layers=1, vocab_size=16, max_len=8, **shape).vocab_rows
    128
    """

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int  # n_heads: multi-head; 1: multi-query; between: grouped-query
    d_head: int
    d_ff: int
    vocab_size: int
    max_len: int  # longest sequence that was trained on; learned positions end here
    position: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10_000.0
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    ffn: Literal["swiglu", "gelu"] = "swiglu"
    bias: bool = False  # on every linear map, as in GPT-2
    tied: bool = False  # the output head is the token embedding
    window: int | None = None  # a query sees this many last positions, itself included
    vocab_multiple: int = 128  # embedding rows are padded up to it (Megatron-LM's rule), so that the tensor axis fits
    init_std: float = 0.02  # of normal initial weights; residual outputs are divided by sqrt(2 n_layers)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool):
                continue
            if isinstance(value, int | float) and not 0 < value < math.inf:
                near = "; nearest: 1" if isinstance(value, int) else ""
                raise RequestError(f"{field.name}={value}: expected a positive number{near}")
            choices = get_args(field.type)
            if isinstance(value, str) and value not in choices:
                raise RequestError(f"{field.name}={value!r}: {nearest(value, choices)}")
        if self.n_heads % self.n_kv_heads:
            divisors = [k for k in range(1, self.n_heads + 1) if self.n_heads % k == 0]
            near = min(divisors, key=lambda k: abs(k - self.n_kv_heads))
            raise RequestError(
                f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}; nearest that is: {near}"
            )
        if self.position == "rotary" and self.d_head % 2:
            raise RequestError(
                f"d_head={self.d_head}: rotary positions turn pairs, so d_head must be even; nearest: {self.d_head + 1}"
            )

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding as stored: `vocab_size` padded. The extra rows can never be predicted."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


def _gpt(layers: int, d_model: int, heads: int, *, max_len: int) -> ModelConfig:
    return ModelConfig(
        n_layers=layers, d_model=d_model, n_heads=heads, n_kv_heads=heads, d_head=d_model // heads,
        d_ff=4 * d_model, vocab_size=50_257, max_len=max_len,
        position="learned", norm="layer", ffn="gelu", bias=True, tied=True,
    )  # fmt: skip


def _llama(layers: int, d_model: int, heads: int, kv: int, d_ff: int, *, llama: int) -> ModelConfig:
    vocab, max_len, theta = {2: (32_000, 4096, 10_000.0), 3: (128_256, 8192, 500_000.0)}[llama]
    return ModelConfig(
        n_layers=layers, d_model=d_model, n_heads=heads, n_kv_heads=kv, d_head=d_model // heads,
        d_ff=d_ff, vocab_size=vocab, max_len=max_len, rope_theta=theta,
    )  # fmt: skip


PRESETS: Mapping[str, ModelConfig] = {
    # Ours: small enough for two CPU cores, every dim divisible by 8 so that every mesh axis fits it.
    "tiny": ModelConfig(
        n_layers=8,
        d_model=128,
        n_heads=8,
        n_kv_heads=8,
        d_head=16,
        d_ff=384,
        vocab_size=264,
        max_len=256,
        vocab_multiple=8,
        tied=True,
    ),
    # GPT-2: Radford et al. 2019, table 2, and the released weights (openai/gpt-2).
    "gpt2-124m": _gpt(12, 768, 12, max_len=1024),
    "gpt2-350m": _gpt(24, 1024, 16, max_len=1024),
    "gpt2-774m": _gpt(36, 1280, 20, max_len=1024),
    "gpt2-1.5b": _gpt(48, 1600, 25, max_len=1024),
    # GPT-3: Brown et al. 2020 (arXiv:2005.14165), table 2.1; parameter counts in table D.1. Two rows of table 2.1
    # contradict themselves and D.1: "XL" prints 24 heads of 128 for d_model 2048 (16 x 128 is meant, as
    # 1,320M parameters need), and "13B" prints d_model 5140 for 40 heads of 128 (5120). The paper's alternating
    # banded attention is left out: its band is not published, and it changes no parameter.
    "gpt3-125m": _gpt(12, 768, 12, max_len=2048),
    "gpt3-350m": _gpt(24, 1024, 16, max_len=2048),
    "gpt3-760m": _gpt(24, 1536, 16, max_len=2048),
    "gpt3-1.3b": _gpt(24, 2048, 16, max_len=2048),
    "gpt3-2.7b": _gpt(32, 2560, 32, max_len=2048),
    "gpt3-6.7b": _gpt(32, 4096, 32, max_len=2048),
    "gpt3-13b": _gpt(40, 5120, 40, max_len=2048),
    "gpt3-175b": _gpt(96, 12_288, 96, max_len=2048),
    # Llama 2: Touvron et al. 2023 (arXiv:2307.09288) and the released params.json.
    "llama2-7b": _llama(32, 4096, 32, 32, 11_008, llama=2),
    "llama2-13b": _llama(40, 5120, 40, 40, 13_824, llama=2),
    "llama2-70b": _llama(80, 8192, 64, 8, 28_672, llama=2),
    # Llama 3: Grattafiori et al. 2024 (arXiv:2407.21783), table 3.
    "llama3-8b": _llama(32, 4096, 32, 8, 14_336, llama=3),
    "llama3-70b": _llama(80, 8192, 64, 8, 28_672, llama=3),
    "llama3-405b": _llama(126, 16_384, 128, 8, 53_248, llama=3),
}


def preset(name: str, overrides: Mapping[str, str] | None = None) -> ModelConfig:
    """A published model by its slug, with keys replaced as the command line gives them.

    >>> preset("tiny", {"n_layers": "2"}).n_layers
    2
    """
    if name not in PRESETS:
        raise RequestError(f"unknown preset {name!r}: {nearest(name, PRESETS)}")
    return dataclasses.replace(PRESETS[name], **_typed(overrides or {}))


def _typed(overrides: Mapping[str, str]) -> dict[str, Any]:
    kinds = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
    typed = {}
    for key, text in overrides.items():
        if key not in kinds:
            raise RequestError(f"unknown key --model.{key}: {nearest(key, kinds)}")
        typed[key] = _value(key, text, kinds[key])
    return typed


def _value(key: str, text: str, kind: Any) -> Any:
    if get_args(kind) and str in map(type, get_args(kind)):  # Literal: checked by ModelConfig
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise RequestError(f"--model.{key}={text}: expected true or false")
        return text.lower() == "true"
    if type(None) in get_args(kind) and text.lower() == "none":
        return None
    number = float if kind is float else int
    try:
        return number(text)
    except ValueError:
        raise RequestError(
            f"--model.{key}={text}: expected {'a number' if number is float else 'a whole number'}"
        ) from None
