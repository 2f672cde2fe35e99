"""What stands between two attentions: norm, feed-forward, and the decoder layer that joins them.

Letters: B batch, L length, D model, F feed-forward.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from transformer.attention import Attention, Backend
from transformer.config import ModelConfig
from transformer.params import Param, Params, declare, normal, ones, zeros
from transformer.sharding import Shard


def norm_params(config: ModelConfig) -> Mapping[str, Param]:
    """RMSNorm has a scale, LayerNorm a bias too."""
    scale = {"scale": Param((config.d_model,), ("channel",), ones)}
    return scale if config.norm == "rms" else scale | {"bias": Param((config.d_model,), ("channel",), zeros)}


def norm(params: Params, x: Float[Array, "B L D"], *, eps: float) -> Float[Array, "B L D"]:
    """LayerNorm (Ba et al. 2016), or without a bias RMSNorm (Zhang & Sennrich 2019), in float32.

    LayerNorm: (x - mean) / sqrt(var + eps) * scale + bias. RMSNorm: x / sqrt(mean(x^2) + eps) * scale.
    """
    x32 = x.astype(jnp.float32)
    if "bias" in params:
        x32 = x32 - x32.mean(-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + eps)
    x32 = x32 * params["scale"].astype(jnp.float32)[None, None]
    if "bias" in params:
        x32 = x32 + params["bias"].astype(jnp.float32)[None, None]
    return x32.astype(x.dtype)


def feed_forward_params(config: ModelConfig) -> Mapping[str, Param]:
    """Up to d_ff and down again; SwiGLU has a second way up, the gate."""
    D, F = config.d_model, config.d_ff
    std = config.init_std
    table: dict[str, Param] = {
        "w_up": Param((D, F), ("embed", "ffn"), normal(std)),
        "w_down": Param((F, D), ("ffn", "embed"), normal(std / (2 * config.n_layers) ** 0.5)),
    }
    if config.ffn == "swiglu":
        table["w_gate"] = Param((D, F), ("embed", "ffn"), normal(std))
    if config.bias:
        table |= {"b_up": Param((F,), ("ffn",), zeros), "b_down": Param((D,), ("channel",), zeros)}
        if config.ffn == "swiglu":
            table["b_gate"] = Param((F,), ("ffn",), zeros)
    return table


def feed_forward(
    params: Params, x: Float[Array, "B L D"], *, config: ModelConfig, shard: Shard
) -> Float[Array, "B L D"]:
    """SwiGLU: (silu(x W_gate) * x W_up) W_down (Shazeer 2020, eq. 6).

    GELU: gelu(x W_up) W_down in the tanh form, as in GPT-2.
    """
    up = jnp.einsum("bld,df->blf", x, params["w_up"])
    up = up + params["b_up"][None, None] if config.bias else up
    if config.ffn == "swiglu":
        gate = jnp.einsum("bld,df->blf", x, params["w_gate"])
        gate = gate + params["b_gate"][None, None] if config.bias else gate
        hidden = jax.nn.silu(gate) * up
    else:
        hidden = jax.nn.gelu(up, approximate=True)
    hidden = shard.activation(hidden, "batch", "length", "ffn")
    out = jnp.einsum("blf,fd->bld", hidden, params["w_down"])
    return out + params["b_down"][None, None] if config.bias else out


class Norm(nn.Module):
    """Names and initialises the parameters of `norm`."""

    config: ModelConfig
    shard: Shard

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        table = norm_params(self.config)
        return norm(self.shard.weights(declare(self, table), table), x, eps=self.config.norm_eps)


class FeedForward(nn.Module):
    """Names and initialises the parameters of `feed_forward`."""

    config: ModelConfig
    shard: Shard

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        table = feed_forward_params(self.config)
        return feed_forward(self.shard.weights(declare(self, table), table), x, config=self.config, shard=self.shard)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)): pre-norm, as GPT-2 and Llama.

    Takes and returns a scan carry, so that all layers are one compiled body.
    """

    config: ModelConfig
    backend: Backend
    shard: Shard

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], _: None = None) -> tuple[Float[Array, "B L D"], None]:
        config, shard = self.config, self.shard
        h = Norm(config, shard, name="attention_norm")(x)
        x = x + Attention(config, self.backend, shard, name="attention")(h)
        x = shard.activation(x, "batch", "length", "embed")
        h = Norm(config, shard, name="ffn_norm")(x)
        x = x + FeedForward(config, shard, name="ffn")(h)
        return shard.activation(x, "batch", "length", "embed"), None
