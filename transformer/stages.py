"""A model in pieces, for the stages of a pipeline: what comes before the layers, a layer, what comes after.

They are the modules of `models.py`, each applied to its own part of the same parameters.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from transformer.attention import Context
from transformer.backends import attend_by
from transformer.embedding import Embedding, embedding_params
from transformer.layers import Norm
from transformer.models import (
    Batch,
    Output,
    Pattern,
    Transformer,
    head_of,
    head_params,
    relative_params,
    stack_bias,
)
from transformer.pipeline import Model
from transformer.positions import Bias
from transformer.remat import policy
from transformer.sharding import context_order


def _applied(module: nn.Module, params: Any, *args: Any) -> Any:
    return module.apply({"params": params}, *args)


def _keep_all_but_placements(primitive: Any, *_: Any, **__: Any) -> bool:
    """Or every microbatch on its way would keep a copy of the weights that its layer has gathered."""
    return primitive.name != "sharding_constraint"


def in_stages(model: Transformer, add: Callable[[Any], Array], loss: Callable[[Output, Batch], Array]) -> Model:
    """A decoder or an encoder in pieces, for stages of a pipeline. `add`: what a layer's loads add to the loss;
    `loss`: of an output and its batch. The stack is one block, whose repeats are the layers that stages share out."""
    config, shard = model.config, model.shard
    name, causal = ("encoder", False) if config.family == "encoder" else ("decoder", True)
    (block,) = config.blocks()
    attend = partial(attend_by, model.backend, shard=shard)
    layers = Pattern(config, block, attend, model.precision, "none", shard, causal=causal, cross=False, train=False)

    def positions(rows: Batch) -> Array:
        given = rows.get("positions")
        length = rows["inputs"].shape[1]
        return jnp.asarray(context_order(length, shard.context_shards))[None] if given is None else given

    def first(outer: Any, rows: Batch) -> Array:
        embed = Embedding(config, shard)
        x, _ = _applied(embed, outer["embedding"], rows["inputs"], positions(rows), rows.get("types"))
        return _applied(Norm(config, shard), outer["embedding_norm"], x) if config.embed_norm else x

    def layer(p: Any, bias: Bias | None, x: Array, rows: Batch) -> tuple[tuple[Array, Array], Any]:
        context = Context(
            positions(rows), bias, segments=rows.get("segments"), prefix=rows.get("prefix") if config.prefix else None
        )
        x, loads = _applied(layers, p, x, context)
        return (x, add(loads)), loads

    def last(outer: Any, x: Array, rows: Batch) -> Array:
        if config.norm_placement != "post":
            x = _applied(Norm(config, shard), outer[name]["final_norm"], x)
        table_VD = shard.weights(outer["embedding"], embedding_params(config))["tokens"]
        params = shard.weights(outer.get("head", {}), head_params(config))
        return loss(Output(*head_of(config, params, x, table_VD), {}), rows)

    def shared(outer: Any) -> Bias | None:
        table = None
        if config.position == "relative":
            table = shard.weights(outer[name]["relative"], relative_params(config))["table"]
        return stack_bias(config, table, causal=causal)

    kept = _keep_all_but_placements if model.remat == "none" else policy(model.remat)
    layer = jax.checkpoint(layer, policy=kept, prevent_cse=False)
    return Model(first, layer, last, shared)
