"""What a model is: one frozen description that serves every family. The published ones are in `presets.py`."""

import dataclasses
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args, get_origin

from transformer.errors import RequestError, nearest

Weights = Literal["f32", "bf16"]  # of parameters between steps
Remat = str  # as `remat.fates` reads it: "full", or "full,ffn_up:save"
Precision = Literal["bf16", "f32", "fp8", "int8"]  # 8-bit ones of linear maps, all else bf16
Backend = Literal["xla", "blockwise", "cudnn", "splash"]
ExpertProducts = Literal["loop", "grouped"]  # of dropless experts: dropless.py, grouped.py

MAY_BE_ZERO = ("dropout", "label_smoothing", "z_loss", "balance_loss", "balance_rate", "router_scale")


_OF_EXPERTS = (
    "experts_per_token", "d_expert", "n_shared_experts", "moe_every", "n_dense_layers", "router", "router_normalize",
    "router_scale", "router_groups", "router_top_groups", "capacity_factor", "balance_loss", "balance_rate",
)  # fmt: skip


class LayerKind(NamedTuple):
    """In what one layer of a stack differs from another."""

    local: bool  # sees its window or chunk only
    rotates: bool  # has rotary positions, where the model has them
    experts: bool  # its feed-forward is a mixture of experts


class Block(NamedTuple):
    """Layers that the compiler sees once: `kinds` one after another, repeated `repeats` times."""

    first: int  # number of its first layer
    repeats: int
    kinds: tuple[LayerKind, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A Transformer. What a key means where it is used has its equation and source there.

    >>> shape = dict(d_model=8, n_heads=2, n_kv_heads=1, d_head=4, d_ff=32)
    >>> ModelConfig(n_layers=1, vocab_size=16, max_len=8, **shape).vocab_rows
    128
    """

    family: Literal["decoder", "encoder", "encoder_decoder"] = "decoder"
    n_layers: int  # of each stack
    d_model: int
    n_heads: int
    n_kv_heads: int  # n_heads: multi-head; 1: multi-query; between: grouped-query
    d_head: int  # of queries and keys, rotating part included
    d_ff: int
    vocab_size: int
    max_len: int  # longest sequence that was trained on; learned positions end here

    # Attention
    score: Literal["scaled_dot", "dot", "additive", "cosine"] = "scaled_dot"
    share: Literal["none", "query_key", "key_value"] = "none"  # one map for queries and keys; keys that are the values
    score_scale: float | None = None  # instead of 1 / sqrt(d_head)
    score_cap: float | None = None  # scores are bent to stay within +- this
    qk_norm: bool = False  # RMSNorm of every query and key head
    sinks: bool = False  # a learned score per head that takes weight and gives nothing
    q_rank: int | None = None  # latent attention: width that queries pass through
    kv_rank: int | None = None  # latent attention where given: width that keys and values pass through
    d_rope: int | None = None  # latent attention: the part of d_head that rotates, its key shared by all heads
    d_value: int | None = None  # of values; default d_head
    # Masks
    prefix: bool = False  # a decoder whose first part sees all of itself
    window: int | None = None  # a query sees this many last positions, itself included
    chunk: int | None = None  # a query sees the chunk of so many positions that it stands in
    global_every: int | None = None  # every so many-th layer sees all; default: none does where window or chunk is set
    # Positions
    position: Literal["rotary", "learned", "sinusoidal", "relative", "alibi", "none"] = "rotary"
    rope_theta: float = 10_000.0
    rope_theta_local: float | None = None  # of local layers; default rope_theta, and then scaled as the others
    rope_fraction: float = 1.0  # of a head that rotates
    rope_scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    rope_factor: float = 1.0  # by which rope_scaling stretches
    rope_trained_len: int | None = None  # positions that were trained on before it
    no_rope_every: int | None = None  # every so many-th layer has no positions
    relative_buckets: int = 32
    relative_distance: int = 128
    # Norm and residual
    norm: Literal["rms", "layer"] = "rms"
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    norm_eps: float = 1e-5
    norm_bias: bool = True  # LayerNorm's
    parallel: bool = False  # attention and feed-forward read the same input, of one norm unless parallel_norms
    parallel_norms: bool = False
    dropout: float = 0.0  # of embeddings and of what attention and feed-forward add
    # Linear maps
    bias: bool = False  # on every linear map, as in GPT-2
    qkv_bias: bool = False  # on the maps to queries, keys and values, as in Qwen2
    ffn: Literal["swiglu", "geglu", "gelu", "gelu_exact", "relu", "relu2"] = "swiglu"
    # Mixture of experts
    n_experts: int | None = None
    experts_per_token: int = 2
    d_expert: int | None = None  # hidden width of an expert; default d_ff
    n_shared_experts: int | None = None  # that every token passes through
    moe_every: int = 1  # every so many-th layer has experts
    n_dense_layers: int | None = None  # first layers that have none
    router: Literal["softmax", "sigmoid"] = "softmax"
    router_normalize: bool = True  # the chosen experts' weights add up to 1
    router_scale: float = 1.0  # of the weights
    router_groups: int | None = None  # experts are chosen in the best groups only ...
    router_top_groups: int | None = None  # ... which are so many
    capacity_factor: float | None = None  # an expert takes this times its even share, the rest is dropped; none: all
    balance_loss: float = 0.0  # coefficient of the loss that evens out the experts' loads
    balance_rate: float = 0.0  # by which a step moves each expert's bias in the choice towards an even load
    # Embedding and head
    embed_scale: bool = False  # embeddings are multiplied by sqrt(d_model)
    embed_norm: bool = False
    token_types: int | None = None  # rows of a second table, of which row 0 is added unless the batch says others
    tied: bool = False  # the output head is the token embedding
    head_bias: bool = False
    head_transform: bool = False  # a dense layer and a norm before the head, as in BERT
    logit_scale: float | None = None
    logit_cap: float | None = None
    vocab_multiple: int = 128  # embedding rows are padded up to it (Megatron-LM's rule), so that the tensor axis fits
    # Initial values and loss
    init: Literal["normal", "residual", "truncated", "xavier", "fan_in", "t5"] = "residual"
    init_std: float = 0.02
    label_smoothing: float = 0.0
    z_loss: float = 0.0  # coefficient of log(Z)^2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_value(field.name, field.type, getattr(self, field.name))
        self._check_heads()
        self._check_positions()
        self._check_experts()
        self._check_family()

    def _check_heads(self) -> None:
        if self.n_heads % self.n_kv_heads:
            divisors = [k for k in range(1, self.n_heads + 1) if self.n_heads % k == 0]
            near = min(divisors, key=lambda k: abs(k - self.n_kv_heads))
            raise RequestError(
                f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}; nearest that is: {near}"
            )
        if self.share == "query_key" and self.n_kv_heads != self.n_heads:
            raise RequestError(
                f"share='query_key' makes queries the keys, so n_kv_heads={self.n_kv_heads} must be "
                f"n_heads; nearest: {self.n_heads}"
            )
        if self.share == "key_value" and self.value_size != self.d_head:
            raise RequestError(
                f"share='key_value' makes values the keys, so d_value={self.d_value} must be d_head; "
                f"nearest: {self.d_head}"
            )
        if self.window and self.chunk:
            raise RequestError(f"window={self.window} and chunk={self.chunk}: a local layer has one of the two")
        if self.global_every and not (self.window or self.chunk):
            raise RequestError(f"global_every={self.global_every} without a window or chunk: every layer sees all")
        if self.kv_rank is None:
            given = [name for name in ("q_rank", "d_rope") if getattr(self, name) is not None]
            if given:
                raise RequestError(f"{given[0]}={getattr(self, given[0])} is of latent attention: give kv_rank too")
        elif self.d_rope is None or self.d_rope >= self.d_head:
            raise RequestError(
                f"kv_rank={self.kv_rank} makes attention latent, and then d_rope={self.d_rope} must be given, "
                f"below d_head; nearest: {self.d_head // 2}"
            )
        elif self.qk_norm or self.qkv_bias or self.bias:
            raise RequestError(
                "latent attention (kv_rank) norms its latents and has no biases: no qk_norm, bias, qkv_bias"
            )
        elif self.n_kv_heads != self.n_heads or self.share != "none":
            raise RequestError(
                f"kv_rank={self.kv_rank} makes attention latent: expected n_kv_heads={self.n_heads} and share=none, "
                f"not {self.n_kv_heads} and {self.share}"
            )

    def _check_positions(self) -> None:
        if self.rope_scaling != "none" and self.position != "rotary":
            raise RequestError(
                f"rope_scaling={self.rope_scaling!r} is of rotary positions, not of position={self.position!r}; "
                "nearest: rope_scaling=none"
            )
        if self.rope_factor != 1 and self.rope_scaling == "none":
            raise RequestError(
                f"rope_factor={self.rope_factor} stretches nothing without rope_scaling; nearest: rope_scaling=linear"
            )
        if self.rope_theta_local is not None and not (self.window or self.chunk):
            raise RequestError(
                f"rope_theta_local={self.rope_theta_local} is of local layers, and without window or chunk there are "
                f"none; nearest: rope_theta={self.rope_theta_local}"
            )
        for name in ("rope_theta", "rope_theta_local"):
            if (getattr(self, name) or math.inf) <= 1:
                raise RequestError(f"{name}={getattr(self, name)}: expected above 1, such as 10000")
        if self.position == "relative":
            exact = self.relative_buckets // (2 if self.family == "decoder" else 4)  # with a bucket for each distance
            most = self.relative_buckets // (4 if self.family == "encoder" else 2)
            if exact < 1 or self.relative_distance <= most:
                raise RequestError(
                    f"relative_buckets={self.relative_buckets}, relative_distance={self.relative_distance}: expected "
                    f"at least {2 if self.family == 'decoder' else 4} buckets, and a distance above {most}"
                )
        if self.position != "rotary":
            return
        if self.rope_fraction > 1:
            raise RequestError(f"rope_fraction={self.rope_fraction}: expected at most 1; nearest: 1")
        if not self.rotating:
            raise RequestError(
                f"rope_fraction={self.rope_fraction} of d_head={self.d_head} rotates nothing; nearest: 1"
            )
        if self.rotating % 2:
            if self.rope_fraction == 1 and not self.d_rope:
                raise RequestError(
                    f"d_head={self.d_head}: rotary positions turn pairs, so d_head must be even; "
                    f"nearest: {self.d_head + 1}"
                )
            raise RequestError(f"{self.rotating} of d_head={self.d_head} rotate: expected an even number")
        if self.rope_scaling in ("llama3", "yarn") and self.rope_trained_len is None:
            raise RequestError(f"rope_scaling={self.rope_scaling!r} needs rope_trained_len, such as {self.max_len}")

    def _check_experts(self) -> None:
        if self.n_experts is None:
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            for name in _OF_EXPERTS:
                if getattr(self, name) != defaults[name]:
                    raise RequestError(
                        f"{name}={getattr(self, name)} is of a mixture of experts: expected n_experts too"
                    )
            return
        if self.bias:
            raise RequestError("bias=True: experts have no biases; nearest: qkv_bias=true")
        if self.n_experts < self.experts_per_token:
            raise RequestError(
                f"n_experts={self.n_experts} is fewer than experts_per_token={self.experts_per_token}; "
                f"nearest: experts_per_token={self.n_experts}"
            )
        self._check_groups(self.n_experts)
        if (self.n_dense_layers or 0) >= self.n_layers:
            raise RequestError(
                f"n_dense_layers={self.n_dense_layers} of n_layers={self.n_layers} leave none with experts; "
                f"nearest: {self.n_layers - 1}"
            )
        if not any(self.kind(layer).experts for layer in range(self.n_layers)):
            raise RequestError(
                f"moe_every={self.moe_every} leaves none of n_layers={self.n_layers} with experts; nearest: 1"
            )
        if self.experts_per_token == 1 and self.router_normalize:
            raise RequestError(
                "router_normalize=True of experts_per_token=1: every weight is 1, and no gradient reaches the router; "
                "nearest: router_normalize=false"
            )

    def _check_groups(self, n_experts: int) -> None:
        groups, top = self.router_groups, self.router_top_groups
        if (groups is None) != (top is None):
            raise RequestError(f"router_groups={groups} and router_top_groups={top}: give both or none")
        if groups is None or top is None:
            return
        if n_experts % groups:
            raise RequestError(f"n_experts={n_experts} is not a multiple of router_groups={groups}")
        if top > groups:
            raise RequestError(f"router_top_groups={top} is more than router_groups={groups}; nearest: {groups}")
        if n_experts // groups * top < self.experts_per_token:
            raise RequestError(
                f"router_top_groups={top} leaves {n_experts // groups * top} experts to choose "
                f"experts_per_token={self.experts_per_token} from"
            )

    def _check_family(self) -> None:
        if self.prefix and self.family != "decoder":
            raise RequestError(f"prefix is of decoders: family={self.family!r}")
        if self.parallel and self.family == "encoder_decoder":
            raise RequestError(
                "parallel layers have no cross-attention: family='encoder_decoder'; nearest: parallel=false"
            )
        if self.parallel_norms and not self.parallel:
            raise RequestError("parallel_norms=True is of parallel layers: expected parallel=true too")
        if self.parallel and self.norm_placement != "pre":
            raise RequestError(f"parallel layers are pre-norm, not norm_placement={self.norm_placement!r}")
        if self.dropout >= 1 or self.label_smoothing >= 1:
            raise RequestError(f"dropout={self.dropout}, label_smoothing={self.label_smoothing}: expected below 1")

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding as stored: `vocab_size` padded. The extra rows can never be predicted."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def value_size(self) -> int:
        """Head size of the values."""
        return self.d_value or self.d_head

    @property
    def rotating(self) -> int:
        """Numbers of a query head that rotate."""
        return self.d_rope or int(self.rope_fraction * self.d_head)

    @property
    def gated(self) -> bool:
        """Whether the feed-forward has a second way up."""
        return self.ffn in ("swiglu", "geglu")

    @property
    def expert_size(self) -> int:
        """Hidden width of one expert."""
        return self.d_expert or self.d_ff

    @property
    def is_dropless(self) -> bool:
        """Whether there are experts that take every token that chose them."""
        return self.n_experts is not None and self.capacity_factor is None

    def kind(self, layer: int) -> LayerKind:
        """What the layer of this number is, counted from 0."""

        def every(n: int | None) -> bool:
            return n is not None and (layer + 1) % n == 0

        return LayerKind(
            local=(self.window is not None or self.chunk is not None) and not every(self.global_every),
            rotates=self.position == "rotary" and not every(self.no_rope_every),
            experts=self.n_experts is not None and layer >= (self.n_dense_layers or 0) and every(self.moe_every),
        )

    def blocks(self) -> tuple[Block, ...]:
        """The layers of a stack as repeated patterns, the longest stretch first taken whole.

        >>> shape = dict(d_model=8, n_heads=2, n_kv_heads=1, d_head=4, d_ff=32, vocab_size=16, max_len=8)
        >>> config = ModelConfig(n_layers=8, window=4, global_every=3, **shape)
        >>> [(block.first, block.repeats, len(block.kinds)) for block in config.blocks()]
        [(0, 2, 3), (6, 2, 1)]
        """
        kinds = [self.kind(i) for i in range(self.n_layers)]
        found, at = [], 0
        while at < len(kinds):
            best = Block(at, 1, (kinds[at],))
            for period in range(1, (len(kinds) - at) // 2 + 1):
                pattern = kinds[at : at + period]
                repeats = 1
                while kinds[at + repeats * period : at + (repeats + 1) * period] == pattern:
                    repeats += 1
                if repeats > 1 and repeats * period > best.repeats * len(best.kinds):
                    best = Block(at, repeats, tuple(pattern))
            found.append(best)
            at += best.repeats * len(best.kinds)
        return tuple(found)


def _check_value(name: str, kind: Any, value: Any) -> None:
    """RequestError unless a value is one that its field can have."""
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, str):
        if value not in get_args(kind):
            raise RequestError(f"{name}={value!r}: {nearest(value, get_args(kind))}")
        return
    low_enough = value == 0 and name in MAY_BE_ZERO
    if not (low_enough or 0 < value < math.inf):
        expected = "0 or more" if name in MAY_BE_ZERO else "a positive number"
        near = "; nearest: 1" if isinstance(value, int) and name not in MAY_BE_ZERO else ""
        raise RequestError(f"{name}={value}: expected {expected}{near}")


def override(config: ModelConfig, overrides: Mapping[str, str]) -> ModelConfig:
    """A model with keys replaced as the command line gives them. RequestError names a key or value that is none."""
    kinds = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
    typed = {}
    for key, text in overrides.items():
        if key not in kinds:
            raise RequestError(f"unknown key --model.{key}: {nearest(key, kinds)}")
        typed[key] = _value(key, text, kinds[key])
    return dataclasses.replace(config, **typed)


def _value(key: str, text: str, kind: Any) -> Any:
    if get_origin(kind) is Literal:  # checked by ModelConfig
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise RequestError(f"--model.{key}={text}: expected true or false")
        return text.lower() == "true"
    if isinstance(kind, types.UnionType) and text.lower() == "none":
        return None
    number = float if float in (kind, *get_args(kind)) else int
    try:
        return number(text)
    except ValueError:
        raise RequestError(
            f"--model.{key}={text}: expected {'a number' if number is float else 'a whole number'}"
        ) from None
