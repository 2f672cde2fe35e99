"""The feed-forward of a layer: up to a wider vector, through a non-linearity, and down again, each token by itself.

Letters: B batch, L length, D model, F hidden width.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from transformer.config import ModelConfig, Precision
from transformer.params import Param, Params, declare, weight, zeros
from transformer.placement import Shard
from transformer.products import Linear, linear


def feed_forward_params(config: ModelConfig, width: int | None = None) -> Mapping[str, Param]:
    """Up to `width` (default d_ff) and down again; gated ones have a second way up."""
    D, F = config.d_model, width or config.d_ff
    table: dict[str, Param] = {
        "w_up": weight(config, (D, F), ("embed", "ffn"), fan_in=D, fan_out=F),
        "w_down": weight(config, (F, D), ("ffn", "embed"), fan_in=F, fan_out=D, residual=True),
    }
    if config.gated:
        table["w_gate"] = weight(config, (D, F), ("embed", "ffn"), fan_in=D, fan_out=F)
    if config.bias:
        table |= {"b_up": Param((F,), ("ffn",), zeros), "b_down": Param((D,), ("channel",), zeros)}
        if config.gated:
            table["b_gate"] = Param((F,), ("ffn",), zeros)
    return table


def activate(up: Float[Array, "*any F"], gate: Float[Array, "*any F"] | None, ffn: str) -> Float[Array, "*any F"]:
    """The hidden layer of the way up, and of the gate where there is one.

    relu: max(x, 0) (Vaswani et al. 2017, eq. 2). relu2: its square (So et al. 2021, Primer). gelu: x Phi(x) in its
    tanh form, as in GPT-2; gelu_exact: by the error function, as in BERT (Hendrycks & Gimpel 2016).
    swiglu: silu(gate) x; geglu: gelu(gate) x, tanh form (Shazeer 2020, eqs. 5 and 6).
    """
    if gate is not None:
        return (jax.nn.silu(gate) if ffn == "swiglu" else jax.nn.gelu(gate, approximate=True)) * up
    match ffn:
        case "relu":
            return jax.nn.relu(up)
        case "relu2":
            return jnp.square(jax.nn.relu(up))
        case "gelu":
            return jax.nn.gelu(up, approximate=True)
        case _:
            return jax.nn.gelu(up, approximate=False)


def feed_forward(
    params: Params, x: Float[Array, "B L D"], *, config: ModelConfig, shard: Shard, linear: Linear = linear
) -> Float[Array, "B L D"]:
    """activate(x W_up, x W_gate) W_down (Vaswani et al. 2017, eq. 2; Shazeer 2020)."""
    up = linear("bld,df->blf", x, params["w_up"], "ffn_up")
    up = up + params["b_up"][None, None] if config.bias else up
    gate = None
    if config.gated:
        gate = linear("bld,df->blf", x, params["w_gate"], "ffn_gate")
        gate = gate + params["b_gate"][None, None] if config.bias else gate
    hidden = shard.activation(activate(up, gate, config.ffn), "batch", "length", "ffn")
    out = linear("blf,fd->bld", hidden, params["w_down"], "ffn_down")
    return out + params["b_down"][None, None] if config.bias else out


class FeedForward(nn.Module):
    """Names and initialises the parameters of `feed_forward`."""

    config: ModelConfig
    shard: Shard
    precision: Precision = "bf16"

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        table = feed_forward_params(self.config)
        params = self.shard.weights(declare(self, table), table)
        return feed_forward(
            params, x, config=self.config, linear=partial(linear, precision=self.precision), shard=self.shard
        )
