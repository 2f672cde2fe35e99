"""Attention: what queries, keys and values are, and how a query reads from the values.

Every position of a sequence asks a question (its query q), offers a label (its key k) and holds an
answer (its value v), three linear views of the same vector. A query is scored against every key;
softmax turns the scores of one query into weights that add up to 1; the result is the weighted mean
of the values. A mask says which keys a query may see: in a decoder, none of the future. In
cross-attention the queries come from one sequence, keys and values from another.

That is `attend`, one function. What models vary is passed to it as small pure pieces:

    scores     scaled dot product   q.k / sqrt(H)              Vaswani et al. 2017, eq. 1
               dot product          q.k                        Luong et al. 2015, eq. 8
               additive             w.tanh(q + k)              Bahdanau et al. 2015, app. A.1.2
               cosine               t q.k / (|q| |k|)          Graves et al. 2014, eq. 6; Liu et al. 2022 (t learned)
    maps       one shared           q = k = x W                Kitaev et al. 2020, sec. 2
               key is the value     k = v = x W                Kowsher et al. 2024
               latent               k, v = (x W_down) W_up     DeepSeek-AI 2024 (V2), sec. 2.1.2
    masks      `masks.py`, joined by & and |
    positions  `positions.py`: turned into q and k, or added to the scores
    soft cap   c tanh(s / c)                                   Gemma 2 (2024), sec. 2
    sinks      exp(s_l) / (exp(sink) + sum exp(s))             Xiao et al. 2024; gpt-oss (2025), learned

How it is computed - all scores at once, block by block, by a fused kernel - is in `backends.py`; the
results are the same.

Letters: B batch, L query length, S key length, D model, N query heads, K kv heads, G = N / K queries
that share one kv head (G = 1 is multi-head, K = 1 multi-query), H head size, V head size of the values,
R width of a latent.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from transformer.config import LayerKind, ModelConfig, Precision
from transformer.masks import Mask, check
from transformer.params import Param, Params, declare, ones, weight, zeros
from transformer.placement import Shard
from transformer.positions import Bias, Regrouped, rotary_frequencies, rotate, yarn_temperature
from transformer.products import Linear, linear, to_float32

Score = Callable[[Array, Array], Array]
"""Scores of every query with every key: q [B L K G H], k [B S K H] -> [B K G L S], float32. What is learned [K G H]
is a leaf of a `Partial`."""


def dot(q: Float[Array, "B L K G H"], k: Float[Array, "B S K H"]) -> Float[Array, "B K G L S"]:
    """q.k (Luong et al. 2015, eq. 8)."""
    return to_float32("blkgh,bskh->bkgls", q, k)


def additive(w: Float[Array, "K G H"]) -> Score:
    """w.tanh(q + k), a hidden layer over query and key (Bahdanau et al. 2015, app. A.1.2).

    Holds a vector for every query and key, so it costs H times the memory of the others."""

    def score(
        w: Float[Array, "K G H"], q: Float[Array, "B L K G H"], k: Float[Array, "B S K H"]
    ) -> Float[Array, "B K G L S"]:
        q_BKGLSH = jnp.moveaxis(q, 1, 3)[:, :, :, :, None]
        k_BKGLSH = jnp.moveaxis(k, 1, 2)[:, :, None, None]
        hidden = jnp.tanh(q_BKGLSH.astype(jnp.float32) + k_BKGLSH.astype(jnp.float32))
        return jnp.einsum("bkglsh,kgh->bkgls", hidden, w.astype(jnp.float32))

    return Partial(score, w)


def cosine(
    q: Float[Array, "B L K G H"], k: Float[Array, "B S K H"], log_temperature: Float[Array, "K G"]
) -> tuple[Float[Array, "B L K G H"], Float[Array, "B S K H"]]:
    """Queries and keys whose dot product is t cos(q, k), t = exp(log_temperature) at most 100 (Liu et al. 2022)."""
    q, k = (t.astype(jnp.float32) for t in (q, k))
    q, k = (t / jnp.maximum(jnp.linalg.norm(t, axis=-1, keepdims=True), 1e-6) for t in (q, k))
    t = jnp.exp(jnp.minimum(log_temperature.astype(jnp.float32), jnp.log(100.0)))
    return q * t[None, None, :, :, None], k


HIDDEN = float(jnp.finfo(jnp.float32).min)
"""The score of a key that is not seen: finite, so that a query without keys is no NaN."""


def masked_scores(
    q: Float[Array, "B L K G H"],
    k: Float[Array, "B S K H"],
    mask: Mask,
    places: tuple[Int[Array, " L"], Int[Array, " S"]],
    *,
    scale: float,
    score: Score,
    bias: Bias | None,
    cap: float | None,
) -> Float[Array, "B K G L S"]:
    """What softmax is taken of, for the queries and keys at those places: scaled, capped, biased, masked."""
    scores_BKGLS = scale * score(q, k)
    if cap is not None:
        scores_BKGLS = cap * jnp.tanh(scores_BKGLS / cap)
    if bias is not None:
        scores_BKGLS = scores_BKGLS + bias(*places)[None]
    return jnp.where(mask(*places)[:, None, None], scores_BKGLS, HIDDEN)


def attend(
    q: Float[Array, "B L K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    *,
    scale: float,
    score: Score = dot,
    bias: Bias | None = None,
    cap: float | None = None,
    sinks: Float[Array, "K G"] | None = None,
) -> Float[Array, "B L K G V"]:
    """softmax(scale q k^T) v (Vaswani et al. 2017, eq. 1), grouped as in Ainslie et al. 2023.

    Scores and softmax are float32; the result has v's dtype. A query that may see no key returns the
    mean of v, never NaN (with sinks: zero).
    """
    places = jnp.arange(q.shape[1]), jnp.arange(k.shape[1])
    scores_BKGLS = masked_scores(q, k, mask, places, scale=scale, score=score, bias=bias, cap=cap)
    if sinks is None:
        probs_BKGLS = jax.nn.softmax(scores_BKGLS, axis=-1)
    else:
        sink = jnp.broadcast_to(sinks.astype(jnp.float32)[None, :, :, None, None], (*scores_BKGLS.shape[:-1], 1))
        probs_BKGLS = jax.nn.softmax(jnp.concatenate([scores_BKGLS, sink], axis=-1), axis=-1)[..., :-1]
    return jnp.einsum("bkgls,bskv->blkgv", probs_BKGLS.astype(v.dtype), v)


Attend = Callable[..., Array]
"""`attend`, or what computes the same: takes what it takes."""


class Context(NamedTuple):
    """What the layers of a stack are told beside their input. Every part is a JAX tree or None."""

    positions: Int[Array, "#B L"]
    bias: Bias | None = None  # added to the scores of self-attention
    prefix: Int[Array, " B"] | None = None  # length of the part that all may see
    segments: Int[Array, "B L"] | None = None  # which text of a packed sequence; 0 is padding
    memory: Float[Array, "B S D"] | None = None  # what cross-attention reads: the encoder's output
    memory_segments: Int[Array, "B S"] | None = None


def head_dims(config: ModelConfig) -> tuple[str, str]:
    """Of [K, G]: tensor splits the heads of keys and values, or, where there is but one, those of queries."""
    return ("kv_heads", "group") if config.n_kv_heads > 1 else ("kv_head", "heads")


def attention_params(config: ModelConfig, *, cross: bool = False) -> Mapping[str, Param]:
    """Weights of one attention: three views in, one map out."""
    D, K, H, V = config.d_model, config.n_kv_heads, config.d_head, config.value_size
    G = config.n_heads // K
    kv_heads, group = head_dims(config)
    table: dict[str, Param] = _latent_params(config) if config.kv_rank and not cross else {}
    if not table:
        table["w_q"] = weight(
            config, (D, K, G, H), ("embed", kv_heads, group, "head"), fan_in=D, fan_out=K * G * H, queries=True
        )
        if config.share == "none":
            table["w_k"] = weight(config, (D, K, H), ("embed", kv_heads, "head"), fan_in=D, fan_out=K * H)
        table["w_v"] = weight(config, (D, K, V), ("embed", kv_heads, "head"), fan_in=D, fan_out=K * V)
        if config.bias or config.qkv_bias:
            table["b_q"] = Param((K, G, H), (kv_heads, group, "head"), zeros)
            if config.share == "none":
                table["b_k"] = Param((K, H), (kv_heads, "head"), zeros)
            table["b_v"] = Param((K, V), (kv_heads, "head"), zeros)
    table["w_o"] = weight(
        config, (K, G, V, D), (kv_heads, group, "head", "embed"), fan_in=K * G * V, fan_out=D, residual=True
    )
    if config.bias:
        table["b_o"] = Param((D,), ("channel",), zeros)
    if config.qk_norm:
        table |= {name: Param((H,), ("head",), ones) for name in ("q_scale", "k_scale")}
    if config.score == "additive":
        table["w_score"] = Param((K, G, H), (kv_heads, group, "head"), jax.nn.initializers.normal(H**-0.5))
    if config.score == "cosine":
        table["log_temperature"] = Param((K, G), (kv_heads, group), jax.nn.initializers.constant(jnp.log(10.0)))
    if config.sinks:
        table["sinks"] = Param((K, G), (kv_heads, group), zeros)
    return table


def _latent_params(config: ModelConfig) -> dict[str, Param]:
    D, K, H, V = config.d_model, config.n_kv_heads, config.d_head, config.value_size
    R, Q, d_rope = config.kv_rank, config.q_rank, config.d_rope
    assert R is not None
    assert d_rope is not None

    def up(rank: int, size: int, **of: bool) -> Param:
        return weight(config, (rank, K, size), ("latent", "kv_heads", "head"), fan_in=rank, fan_out=K * size, **of)

    def down(rank: int) -> Param:
        return weight(config, (D, rank), ("embed", "channel"), fan_in=D, fan_out=rank)

    table = {
        "w_kv_down": down(R),
        "kv_scale": Param((R,), ("channel",), ones),
        "w_k_rope": down(d_rope),
        "w_k_up": up(R, H - d_rope),
        "w_v_up": up(R, V),
    }
    if Q is None:
        wide = weight(config, (D, K, H), ("embed", "kv_heads", "head"), fan_in=D, fan_out=K * H, queries=True)
        return table | {"w_q": wide}
    return table | {
        "w_q_down": down(Q),
        "latent_q_scale": Param((Q,), ("channel",), ones),
        "w_q_up": up(Q, H, queries=True),
    }


def rms(x: Float[Array, "*any H"], scale: Float[Array, " H"], eps: float) -> Float[Array, "*any H"]:
    """x / sqrt(mean(x^2) + eps) * scale over the last dim (Zhang & Sennrich 2019), float32 inside."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + eps)
    return (x32 * scale.astype(jnp.float32).reshape(*(1,) * (x.ndim - 1), -1)).astype(x.dtype)


QKV = tuple[Float[Array, "B L K G H"], Float[Array, "B S K H"], Float[Array, "B S K V"]]


def _views(params: Params, x: Array, read: Array, config: ModelConfig, linear: Linear) -> QKV:
    """Queries of x, keys and values of what is read: x itself, or a memory."""

    def bias(name: str) -> Array | float:
        return params[name][None, None] if name in params else 0.0

    q = linear("bld,dkgh->blkgh", x, params["w_q"], "queries") + bias("b_q")
    v = linear("bsd,dkv->bskv", read, params["w_v"], "values") + bias("b_v")
    if config.share == "key_value":
        return q, v, v
    if config.share == "query_key":
        k = q if read is x else linear("bsd,dkgh->bskgh", read, params["w_q"], "keys") + bias("b_q")
        return q, k[:, :, :, 0], v
    return q, linear("bsd,dkh->bskh", read, params["w_k"], "keys") + bias("b_k"), v


def _in_groups(params: Params, table: Mapping[str, Param], n: int) -> Params:
    """All queries share one head of keys and values: n groups of queries, and to each its own copy of that head's maps.
    Copies of the maps, not of what they make: a device's part of the gradient of x is then a sum like all others."""

    def grouped(t: Array, dims: Sequence[str]) -> Array:
        if "kv_head" not in dims:
            return t
        at = dims.index("kv_head")
        if "heads" in dims:
            return t.reshape(*t.shape[:at], n, -1, *t.shape[at + 2 :])
        return jnp.broadcast_to(t, (*t.shape[:at], n, *t.shape[at + 1 :]))

    return {name: grouped(t, table[name].dims) for name, t in params.items()}


def _latent_views(params: Params, x: Array, turn: Callable[[Array], Array], config: ModelConfig, linear: Linear) -> QKV:
    """Multi-head latent attention (DeepSeek-V2, eqs. 9-19): keys and values from one narrow latent, and beside
    it a key that rotates and that all heads share."""
    if config.q_rank is None:
        q = linear("bld,dkh->blkh", x, params["w_q"], "queries")
    else:
        latent = rms(linear("bld,dr->blr", x, params["w_q_down"], "latents"), params["latent_q_scale"], config.norm_eps)
        q = linear("blr,rkh->blkh", latent, params["w_q_up"], "queries")
    still = config.d_head - config.rotating
    q = jnp.concatenate([q[..., :still], turn(q[..., still:])], axis=-1)
    latent = rms(linear("bld,dr->blr", x, params["w_kv_down"], "latents"), params["kv_scale"], config.norm_eps)
    k_still = linear("blr,rkh->blkh", latent, params["w_k_up"], "keys")
    k_turned = turn(linear("bld,dr->blr", x, params["w_k_rope"], "latents")[:, :, None])
    k_turned = jnp.broadcast_to(k_turned, (*k_still.shape[:-1], config.rotating))
    v = linear("blr,rkv->blkv", latent, params["w_v_up"], "values")
    return q[:, :, :, None], jnp.concatenate([k_still, k_turned], axis=-1), v


def attention(
    params: Params,
    x: Float[Array, "B L D"],
    mask: Mask,
    context: Context,
    *,
    kind: LayerKind,
    cross: bool,
    config: ModelConfig,
    attend: Attend,
    shard: Shard,
    linear: Linear = linear,
) -> Float[Array, "B L D"]:
    """Look at x three ways - or, where `cross`, at x once and twice at the memory - attend, and map back.

    `attend` is this file's, or another way to compute the same (`backends.py`).
    """
    bias = None if cross else context.bias
    if config.n_kv_heads == 1:
        params = _in_groups(params, attention_params(config, cross=cross), shard.head_shards)
        bias = bias and Regrouped(bias, shard.head_shards)
    read = x
    if cross:
        assert context.memory is not None
        read = shard.enter(context.memory)

    def turn(t: Array) -> Array:
        return rotate(t, context.positions, rotary_frequencies(config, kind)) if kind.rotates else t

    if config.kv_rank and not cross:
        q, k, v = _latent_views(params, x, turn, config, linear)
    else:
        q, k, v = _views(params, x, read, config, linear)
        if config.qk_norm:
            q, k = rms(q, params["q_scale"], config.norm_eps), rms(k, params["k_scale"], config.norm_eps)
        if not cross:
            q, k = turn(q), turn(k)
    scale = config.d_head**-0.5 if config.score == "scaled_dot" else 1.0
    scale = (config.score_scale or scale) * (1.0 if cross else yarn_temperature(config, kind))
    if config.score == "cosine":
        q, k = (t.astype(x.dtype) for t in cosine(q, k, params["log_temperature"]))
    q = shard.activation(q, "batch", "length", "kv_heads", "group", "head")
    k = shard.activation(k, "batch", "length", "kv_heads", "head")
    v = shard.activation(v, "batch", "length", "kv_heads", "head")
    check(mask, batch=q.shape[0], n_queries=q.shape[1], n_keys=k.shape[1])
    out_BLKGV = attend(
        q, k, v, mask, scale=scale, score=additive(params["w_score"]) if config.score == "additive" else dot,
        bias=bias, cap=config.score_cap, sinks=params.get("sinks"),
    )  # fmt: skip
    out = linear("blkgv,kgvd->bld", out_BLKGV, params["w_o"], "attention_projection")
    return out + params["b_o"][None, None] if config.bias else out


class Attention(nn.Module):
    """Names and initialises the parameters of `attention`."""

    config: ModelConfig
    kind: LayerKind
    attend: Attend
    shard: Shard
    cross: bool = False
    precision: Precision = "bf16"

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], mask: Mask, context: Context) -> Float[Array, "B L D"]:
        table = attention_params(self.config, cross=self.cross)
        params = self.shard.weights(declare(self, table), table)
        return attention(
            params, x, mask, context,
            kind=self.kind, cross=self.cross, config=self.config, attend=self.attend,
            linear=partial(linear, precision=self.precision), shard=self.shard,
        )  # fmt: skip
