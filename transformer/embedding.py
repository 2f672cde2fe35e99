"""From tokens to vectors: the table's rows, and what says where a token stands and of which kind it is.

Letters: B batch, L length, D model, V vocabulary as stored (padded).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from transformer.config import ModelConfig
from transformer.layers import between
from transformer.params import Param, declare, embedding
from transformer.placement import Shard
from transformer.positions import sinusoidal


def embedding_params(config: ModelConfig) -> Mapping[str, Param]:
    """One row per token, with learned positions one per position, one per token type."""
    table = {"tokens": embedding(config, config.vocab_rows, "vocab")}
    if config.position == "learned":
        table["positions"] = embedding(config, config.max_len, "position")
    if config.token_types:
        table["types"] = embedding(config, config.token_types, "position")
    return table


@jax.custom_vjp
def lookup(table: Float[Array, "V D"], tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """The rows of tokens. Their gradients add up in float32: in 16 bit a frequent token's would soon stop growing."""
    return jnp.take(table, tokens, axis=0)


def _lookup_forward(table: Array, tokens: Array) -> tuple[Array, tuple[Array, Array]]:
    return jnp.take(table, tokens, axis=0), (jnp.zeros((table.shape[0], 0), table.dtype), tokens)


def _lookup_backward(kept: tuple[Array, Array], grad: Float[Array, "B L D"]) -> tuple[Array, None]:
    like, tokens = kept  # of the table its rows and type
    sums = jnp.zeros((like.shape[0], grad.shape[-1]), jnp.float32)
    return sums.at[tokens].add(grad.astype(jnp.float32)).astype(like.dtype), None


lookup.defvjp(_lookup_forward, _lookup_backward)


def _apart(table: Float[Array, "V D"], tokens: Int[Array, "B L"], shard: Shard) -> Float[Array, "B L D"]:
    """Every device that has other tokens looks them up in a table of its own: so gradients add up in float32 on it, and
    travel once, in the table's type."""
    P, C, (B, L) = shard.batch_shards, shard.context_shards, tokens.shape
    own = shard.own(table, "vocab", "embed")
    apart = tokens.reshape(P, B // P, C, L // C).swapaxes(1, 2)
    x: Any = jax.vmap(jax.vmap(lookup))(own, apart)
    return x.swapaxes(1, 2).reshape(B, L, -1)


class Embedding(nn.Module):
    config: ModelConfig
    shard: Shard

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B L"], positions: Int[Array, "#B L"], types: Int[Array, "B L"] | None
    ) -> tuple[Float[Array, "B L D"], Float[Array, "V D"]]:
        config, shard = self.config, self.shard
        table = embedding_params(config)
        params = shard.weights(declare(self, table), table)
        x = _apart(params["tokens"], tokens, shard)
        if config.embed_scale:
            x = x * jnp.asarray(config.d_model**0.5, x.dtype)
        if config.position == "learned":
            x = x + jnp.take(params["positions"], positions, axis=0)
        if config.position == "sinusoidal":
            x = x + sinusoidal(positions, config.d_model).astype(x.dtype)
        if config.token_types:
            x = x + (params["types"][0][None, None] if types is None else jnp.take(params["types"], types, axis=0))
        return between(x, shard), params["tokens"]
