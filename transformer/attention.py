"""Attention: what queries, keys and values are, and how a query reads from the values.

Every position of a sequence asks a question (its query q), offers a label (its key k) and holds an
answer (its value v), three linear views of the same vector. A query's score with a key is their
dot product; softmax turns the scores of one query into weights that add up to 1; the result is the
weighted mean of the values. A mask says which keys a query may see: in a decoder, none of the future.

Letters: B batch, L query length, S key length, D model, N query heads, K kv heads, G = N / K queries
that share one kv head, H head size.
"""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from transformer.config import ModelConfig
from transformer.params import Param, Params, declare, normal, zeros
from transformer.sharding import Shard

ATTENTION_OUTPUT = "attention_output"  # the name under which rematerialisation may keep it

Backend = Literal["xla", "cudnn"]


def causal_mask(length: int, window: int | None = None) -> Bool[Array, "L S"]:
    """True where query l may see key s: s <= l, and with a window s > l - window."""
    query, key = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    mask = key <= query
    return mask if window is None else mask & (key > query - window)


def attend(
    q: Float[Array, "B L K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "#B L S"],
) -> Float[Array, "B L K G H"]:
    """softmax(q k^T / sqrt(H)) v (Vaswani et al. 2017, eq. 1), grouped as in Ainslie et al. 2023.

    G = 1 is multi-head, K = 1 multi-query: one code path. Scores and softmax are float32; the result
    has v's dtype. A query that may see no key returns the mean of v, never NaN.
    """
    scale = q.shape[-1] ** -0.5
    scores_BKGLS = jnp.einsum("blkgh,bskh->bkgls", q, k, preferred_element_type=jnp.float32) * scale
    scores_BKGLS = jnp.where(mask[:, None, None], scores_BKGLS, jnp.finfo(jnp.float32).min)
    probs_BKGLS = jax.nn.softmax(scores_BKGLS, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgls,bskh->blkgh", probs_BKGLS, v)


def attend_causal(
    q: Float[Array, "B L K G H"],
    k: Float[Array, "B L K H"],
    v: Float[Array, "B L K H"],
    *,
    window: int | None,
    backend: Backend,
) -> Float[Array, "B L K G H"]:
    """Self-attention that sees no future, by the chosen backend.

    "xla" holds all scores; "cudnn" is NVIDIA's fused kernel, whose memory is linear in length
    (bf16 only). Both compute the same function.
    """
    if backend == "xla":
        return attend(q, k, v, causal_mask(q.shape[1], window)[None])
    B, L, K, G, H = q.shape
    out_BLNH = jax.nn.dot_product_attention(
        q.reshape(B, L, K * G, H), k, v, is_causal=True, implementation="cudnn",
        local_window_size=None if window is None else (window - 1, 0),
    )  # fmt: skip
    return out_BLNH.reshape(B, L, K, G, H)


def rotate(
    x: Float[Array, "B L *heads H"], positions: Int[Array, "#B L"], *, theta: float
) -> Float[Array, "B L *heads H"]:
    """Rotary position embedding (Su et al. 2021): turn the pair (x_i, x_{i+H/2}) by position * theta^(-2i/H).

    Halves, not neighbours, form the pairs, as in the released Llama weights for Hugging Face. float32 inside.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None].astype(jnp.float32) * frequency[None, None, :]
    angle = angle.reshape(*angle.shape[:2], *(1,) * (x.ndim - 3), half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attention_params(config: ModelConfig) -> Mapping[str, Param]:
    """Weights of one attention: three views in, one map out."""
    D, K, H = config.d_model, config.n_kv_heads, config.d_head
    G = config.n_heads // K
    std = config.init_std
    out_std = std / (2 * config.n_layers) ** 0.5  # GPT-2: keeps the residual stream's variance over depth
    table: dict[str, Param] = {
        "w_q": Param((D, K, G, H), ("embed", "kv_heads", "group", "head"), normal(std)),
        "w_k": Param((D, K, H), ("embed", "kv_heads", "head"), normal(std)),
        "w_v": Param((D, K, H), ("embed", "kv_heads", "head"), normal(std)),
        "w_o": Param((K, G, H, D), ("kv_heads", "group", "head", "embed"), normal(out_std)),
    }
    if config.bias:
        table |= {
            "b_q": Param((K, G, H), ("kv_heads", "group", "head"), zeros),
            "b_k": Param((K, H), ("kv_heads", "head"), zeros),
            "b_v": Param((K, H), ("kv_heads", "head"), zeros),
            "b_o": Param((D,), ("channel",), zeros),
        }
    return table


def attention(
    params: Params,
    x: Float[Array, "B L D"],
    *,
    config: ModelConfig,
    backend: Backend,
    shard: Shard,
) -> Float[Array, "B L D"]:
    """Causal self-attention: look at x three ways, attend, and map back to the residual stream."""
    q = jnp.einsum("bld,dkgh->blkgh", x, params["w_q"])
    k = jnp.einsum("bld,dkh->blkh", x, params["w_k"])
    v = jnp.einsum("bld,dkh->blkh", x, params["w_v"])
    if config.bias:
        q, k, v = q + params["b_q"][None, None], k + params["b_k"][None, None], v + params["b_v"][None, None]
    if config.position == "rotary":
        positions = jnp.arange(x.shape[1])[None]
        q, k = (rotate(t, positions, theta=config.rope_theta) for t in (q, k))
    q = shard.activation(q, "batch", "length", "kv_heads", "group", "head")
    k = shard.activation(k, "batch", "length", "kv_heads", "head")
    v = shard.activation(v, "batch", "length", "kv_heads", "head")
    out_BLKGH = attend_causal(q, k, v, window=config.window, backend=backend)
    out_BLKGH = checkpoint_name(out_BLKGH, ATTENTION_OUTPUT)
    out = jnp.einsum("blkgh,kghd->bld", out_BLKGH, params["w_o"])
    return out + params["b_o"][None, None] if config.bias else out


class Attention(nn.Module):
    """Names and initialises the parameters of `attention`."""

    config: ModelConfig
    backend: Backend
    shard: Shard

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        table = attention_params(self.config)
        params = self.shard.weights(declare(self, table), table)
        return attention(params, x, config=self.config, backend=self.backend, shard=self.shard)
