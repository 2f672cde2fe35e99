"""Whole models from layers: the decoder, its parameter table, init and apply.

Letters: B batch, L length, D model, V vocabulary as stored (padded).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, PRNGKeyArray

from transformer.attention import ATTENTION_OUTPUT, Backend, attention_params
from transformer.config import ModelConfig, Remat
from transformer.layers import DecoderLayer, Norm, feed_forward_params, norm_params
from transformer.params import Param, ParamTree, declare, normal, stacked
from transformer.sharding import UNSHARDED, Shard


def embedding_params(config: ModelConfig) -> Mapping[str, Param]:
    """One row per token, and with learned positions one per position."""
    D = config.d_model
    table: dict[str, Param] = {"tokens": Param((config.vocab_rows, D), ("vocab", "embed"), normal(config.init_std))}
    if config.position == "learned":
        table["positions"] = Param((config.max_len, D), ("position", "embed"), normal(config.init_std))
    return table


def head_params(config: ModelConfig) -> Mapping[str, Param]:
    """From the residual stream to logits; nothing where the embedding serves for both."""
    if config.tied:
        return {}
    return {"w_logits": Param((config.d_model, config.vocab_rows), ("embed", "vocab"), normal(config.init_std))}


def decoder_params(config: ModelConfig) -> ParamTree:
    """Every parameter of the decoder, shaped as `Decoder.init` returns them."""
    layer = {
        "attention_norm": norm_params(config),
        "attention": attention_params(config),
        "ffn_norm": norm_params(config),
        "ffn": feed_forward_params(config),
    }
    tree = {
        "embedding": embedding_params(config),
        "layers": stacked(layer, config.n_layers, "layers"),
        "final_norm": norm_params(config),
    }
    return tree if config.tied else tree | {"head": head_params(config)}


def remat_policy(remat: Remat) -> Callable[..., Any]:
    """What the forward pass keeps for the backward one.

    "dots": outputs of the weights' matrix products and of attention (with the fused kernel's own
    residuals), so that only element-wise work, and for plain attention its scores, are redone.
    "full": only each layer's input. ("none" keeps everything and has no policy.)
    """
    if remat == "full":
        return jax.checkpoint_policies.nothing_saveable
    keep = jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT),
    )
    return lambda primitive, *args, **params: (
        "dot_product_attention_fwd" in primitive.name or keep(primitive, *args, **params)
    )


class _Embedding(nn.Module):
    config: ModelConfig
    shard: Shard

    @nn.compact
    def __call__(self, tokens: Int[Array, "B L"]) -> tuple[Float[Array, "B L D"], Float[Array, "V D"]]:
        table = embedding_params(self.config)
        params = self.shard.weights(declare(self, table), table)
        # The plain constraint holds for the gradient too: without it the compiler would split the scatter
        # over fsdp along `embed`, and replicate the activations to do so.
        rows_VD = self.shard.activation(params["tokens"], "vocab", "embed")
        x = jnp.take(rows_VD, tokens, axis=0)
        if self.config.position == "learned":
            x = x + params["positions"][None, : tokens.shape[1]]
        return self.shard.activation(x, "batch", "length", "embed"), params["tokens"]


class _Head(nn.Module):
    config: ModelConfig
    shard: Shard

    @nn.compact
    def __call__(self) -> Float[Array, "D V"]:
        table = head_params(self.config)
        return self.shard.weights(declare(self, table), table)["w_logits"]


class Decoder(nn.Module):
    """Tokens in, float32 logits of the next token out. Compute dtype is that of the parameters given."""

    config: ModelConfig
    backend: Backend = "xla"
    remat: Remat = "none"
    shard: Shard = UNSHARDED

    @nn.compact
    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L V"]:
        config, shard = self.config, self.shard
        x, table_VD = _Embedding(config, shard, name="embedding")(tokens)
        layer = DecoderLayer
        if self.remat != "none":
            layer = nn.remat(layer, policy=remat_policy(self.remat), prevent_cse=False)
        layers = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=config.n_layers)
        x, _ = layers(config, self.backend, shard, name="layers")(x, None)
        x = Norm(config, shard, name="final_norm")(x)
        w_DV = table_VD.T if config.tied else _Head(config, shard, name="head")()
        logits = jnp.einsum("bld,dv->blv", x, w_DV, preferred_element_type=jnp.float32)
        logits = shard.activation(logits, "batch", "length", "vocab")
        if config.vocab_rows == config.vocab_size:
            return logits
        padding = jnp.arange(config.vocab_rows) >= config.vocab_size
        return jnp.where(padding[None, None], jnp.finfo(jnp.float32).min, logits)


def init(model: Decoder, key: PRNGKeyArray) -> dict[str, Any]:
    """Fresh float32 parameters, a plain nested dict."""
    return dict(model.init(key, jnp.zeros((1, 1), jnp.int32))["params"])


def apply(model: Decoder, params: Mapping[str, Any], tokens: Int[Array, "B L"]) -> Float[Array, "B L V"]:
    """Logits of the next token at every position."""
    logits = model.apply({"params": params}, tokens)
    assert isinstance(logits, jax.Array)  # and not a tuple: nothing is mutable
    return logits
