"""A model in pieces, for the stages of a pipeline: what comes before the layers, a layer, what comes after.

They are the modules of `models.py`, each applied to its own part of the same parameters; and the way of stored layers
to their stages.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float

from transformer.attention import Context
from transformer.backends import attend_by
from transformer.config import Block, ModelConfig
from transformer.embedding import Embedding, embedding_params
from transformer.layers import Norm
from transformer.models import (
    Batch,
    Output,
    Pattern,
    Transformer,
    head_of,
    head_params,
    model_params,
    relative_params,
    stack_bias,
)
from transformer.params import Param, ParamTree
from transformer.pipeline import Model, Pipeline, by_stage, in_order
from transformer.placement import at
from transformer.positions import Bias
from transformer.remat import policy
from transformer.sharding import along_stream, context_order, param_spec


def _applied(module: nn.Module, params: Any, *args: Any) -> Any:
    return module.apply({"params": params}, *args)


def _keep_all_but_placements(primitive: Any, *_: Any, **__: Any) -> bool:
    """Or every microbatch on its way would keep a copy of the weights that its layer has gathered."""
    return primitive.name != "sharding_constraint"


def shared_out(config: ModelConfig) -> tuple[Sequence[Block], Block]:
    """The blocks before the one whose repeats the stages share out, and that one: the last."""
    *before, main = config.blocks()
    return before, main


def in_stages(model: Transformer, add: Callable[[Any], Array], loss: Callable[[Output, Batch], Array]) -> Model:
    """A decoder or an encoder in pieces, for stages of a pipeline. `add`: what a layer's loads add to the loss;
    `loss`: of an output and its batch."""
    config, shard = model.config, model.shard
    name, _ = stack_of(config)
    layers = _pattern(model, shared_out(config)[1])

    def layer(p: Any, bias: Bias | None, x: Array, rows: Batch) -> tuple[tuple[Array, Array], Any]:
        x, loads = _applied(layers, p, x, _context(model, rows, bias))
        return (x, add(loads)), loads

    def last(outer: Any, x: Array, rows: Batch) -> Array:
        if config.norm_placement != "post":
            x = _applied(Norm(config, shard), outer[name]["final_norm"], x)
        table_VD = shard.weights(outer["embedding"], embedding_params(config))["tokens"]
        params = shard.weights(outer.get("head", {}), head_params(config))
        return loss(Output(*head_of(config, params, x, table_VD), {}), rows)

    def place(d_outer: Any) -> Any:
        return shard.stored(d_outer, model_params(config))

    return Model(partial(_first, model), _forgetful(model, layer), last, partial(_shared, model), place)


def leading(model: Transformer, stages: int, outer: Any, rows: Batch) -> Float[Array, "G S B L D"]:
    """The stream after the layers before those that stages share out. `rows`: every leaf [M, ...]. Of every S
    microbatches each stage takes one; the last group is filled up with the first microbatches."""
    name, _ = stack_of(model.config)
    blocks, _ = shared_out(model.config)
    n_rows = rows["inputs"].shape[0]
    bias = _shared(model, outer)

    def of_one(x: Array, rows: Batch) -> Array:
        for block in blocks:
            layers = _pattern(model, block)

            def layer(x: Array, p: Any, layers: Pattern = layers) -> tuple[Array, None]:
                return _applied(layers, p, x, _context(model, rows, bias))[0], None

            x, _ = jax.lax.scan(_forgetful(model, layer), x, outer[name][f"block_{block.first}"])
        return x

    def of_group(_: None, rows: Batch) -> tuple[None, Array]:
        x = jax.vmap(partial(_first, model, outer))(rows)
        x = model.shard.activation(x, "layers", "batch", "sequence", "embed")
        x = jax.vmap(of_one, spmd_axis_name="pipeline")(x, rows)
        return None, model.shard.activation(x, "layers", "batch", "sequence", "embed")

    groups = jnp.arange(-(-n_rows // stages) * stages).reshape(-1, stages) % n_rows
    return jax.lax.scan(of_group, None, {name: a[groups] for name, a in rows.items()})[1]


def to_stages(layers: Any, table: ParamTree, pipe: Pipeline, mesh: Mesh) -> Any:
    """Stored layers, stage by stage and as `table` has them.

    All layers of a slice of the stream meet, are put in another order, and go to their stages: by itself the compiler
    would gather every layer everywhere.
    """

    def stage(p: Array, param: Param) -> Array:
        if _is_staged(pipe):
            return p
        whole = param.dims, along_stream(param, mesh.shape)
        p = at(p, mesh, whole)
        return at(by_stage(p, pipe), mesh, whole, (param.dims, param_spec(param, mesh.shape)))

    return jax.tree.map(stage, layers, table)


def from_stages(grads: Any, table: ParamTree, pipe: Pipeline, mesh: Mesh) -> Any:
    """Gradients of what `to_stages` made, in order and as `table` has the stored ones."""

    def order(g: Array, param: Param) -> Array:
        if _is_staged(pipe):
            return g
        staged = param._replace(shape=(pipe.room, *param.shape[1:]))
        whole = param.dims, along_stream(param, mesh.shape)
        # With its stage until it is complete, or the compiler would have it travel in every tick.
        g = at(g, mesh, (param.dims, param_spec(staged, mesh.shape)), whole)
        # And to where it is stored, or each of the optimizer's moments would have its own travel there.
        return at(in_order(g, pipe), mesh, whole, (param.dims, param_spec(param, mesh.shape)))

    return jax.tree.map(order, grads, table)


def _is_staged(pipe: Pipeline) -> bool:
    """Whether layers in order are stage by stage."""
    return pipe.repeats == 1 and pipe.room == pipe.layers


def stack_of(config: ModelConfig) -> tuple[str, bool]:
    """Its name, and whether it is causal."""
    return ("encoder", False) if config.family == "encoder" else ("decoder", True)


def _pattern(model: Transformer, block: Block) -> Pattern:
    attend = partial(attend_by, model.backend, shard=model.shard)
    causal = stack_of(model.config)[1]
    return Pattern(
        model.config, block, attend, model.precision, model.experts, "none", model.shard,
        causal=causal, cross=False, train=False,
    )  # fmt: skip


def _forgetful(model: Transformer, layer: Callable[..., Any]) -> Callable[..., Any]:
    """What a layer's backward pass needs, as the model's remat has it."""
    kept = _keep_all_but_placements if model.remat == "none" else policy(model.remat)
    return jax.checkpoint(layer, policy=kept, prevent_cse=False)


def _positions(model: Transformer, rows: Batch) -> Array:
    given = rows.get("positions")
    length = rows["inputs"].shape[1]
    return jnp.asarray(context_order(length, model.shard.context_shards))[None] if given is None else given


def _context(model: Transformer, rows: Batch, bias: Bias | None) -> Context:
    prefix = rows.get("prefix") if model.config.prefix else None
    return Context(_positions(model, rows), bias, segments=rows.get("segments"), prefix=prefix)


def _first(model: Transformer, outer: Any, rows: Batch) -> Array:
    """The stream before the layers."""
    config, shard = model.config, model.shard
    embed = Embedding(config, shard)
    x, _ = _applied(embed, outer["embedding"], rows["inputs"], _positions(model, rows), rows.get("types"))
    return _applied(Norm(config, shard), outer["embedding_norm"], x) if config.embed_norm else x


def _shared(model: Transformer, outer: Any) -> Bias | None:
    """What every layer adds to its scores."""
    config, (name, causal) = model.config, stack_of(model.config)
    table = None
    if config.position == "relative":
        table = model.shard.weights(outer[name]["relative"], relative_params(config))["table"]
    return stack_bias(config, table, causal=causal)
