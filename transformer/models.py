"""Whole models from layers: encoder, decoder, encoder-decoder; their parameter table, init and apply.

    decoder           tokens -> the next token, each position seeing those before it
    encoder           tokens, some of them hidden -> what was hidden; or one vector for a text (`pooled`)
    encoder_decoder   a source, read whole -> a target, token by token, which reads the source too

What a model reads is a batch, a mapping of int32 arrays:

    inputs            [B L]  tokens
    segments          [B L]  optional: which text of a packed sequence; 0 is padding
    positions         [B L]  optional: place within its text; default 0 ... L - 1
    prefix            [B]    prefix decoders: length of the part that all may see
    types             [B L]  optional: rows of the token type table
    source            [B S]  encoder_decoder: tokens of the source, with source_segments and source_positions

Letters: B batch, L length, S length of the source, D model, V vocabulary as stored (padded).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray

from transformer.attention import Attend, Context, head_dims
from transformer.backends import attend_by
from transformer.config import Backend, Block, ExpertProducts, ModelConfig, Precision, Remat
from transformer.embedding import Embedding, embedding_params
from transformer.errors import RequestError
from transformer.layers import Layer, Norm, layer_params, norm, norm_params
from transformer.params import Param, Params, ParamTree, declare, stacked, weight, zeros
from transformer.placement import UNSHARDED, Shard
from transformer.positions import Alibi, Bias, Relative
from transformer.products import to_float32
from transformer.remat import policy
from transformer.sharding import context_order

Batch = Mapping[str, Any]


class Head(NamedTuple):
    """From the residual stream to logits."""

    w: Float[Array, "D V"]
    bias: Float[Array, " V"] | None


class Output(NamedTuple):
    """What a model makes of a batch. `logits_of` and `losses.cross_entropy` go on from here."""

    x: Float[Array, "B L D"]
    head: Head
    loads: Mapping[str, Any]  # of every layer with experts, as its parameters are stored


def head_params(config: ModelConfig) -> Mapping[str, Param]:
    """From the residual stream to logits; a matrix only where the embedding does not serve for both."""
    D, V = config.d_model, config.vocab_rows
    table: dict[str, Param] = {}
    if config.head_transform:
        table["w_transform"] = weight(config, (D, D), ("embed", "channel"), fan_in=D, fan_out=D)
        table["b_transform"] = Param((D,), ("channel",), zeros)
        table |= {f"norm_{name}": param for name, param in norm_params(config).items()}
    if not config.tied:
        table["w_logits"] = weight(config, (D, V), ("embed", "vocab"), fan_in=D, fan_out=V)
    if config.head_bias:
        table["b_logits"] = Param((V,), ("vocab",), zeros)
    return table


def relative_params(config: ModelConfig) -> Mapping[str, Param]:
    """A number for each bucket of distances and head, shared by the layers of a stack."""
    K, G = config.n_kv_heads, config.n_heads // config.n_kv_heads
    init = jax.nn.initializers.normal(config.d_model**-0.5 if config.init == "t5" else config.init_std)
    return {"table": Param((config.relative_buckets, K, G), ("channel", *head_dims(config)), init)}


def stack_params(config: ModelConfig, *, cross: bool) -> ParamTree:
    """Every parameter of a stack: layers that repeat are stored as one, with the repeats in front."""
    tree: dict[str, Any] = {}
    for block in config.blocks():
        layers = {f"layer_{i}": layer_params(config, kind, cross=cross) for i, kind in enumerate(block.kinds)}
        tree[f"block_{block.first}"] = stacked(layers, block.repeats, "layers")
    if config.norm_placement != "post":
        tree["final_norm"] = norm_params(config)
    if config.position == "relative":
        tree["relative"] = relative_params(config)
    return tree


def model_params(config: ModelConfig) -> ParamTree:
    """Every parameter of a model, shaped as `init` returns them."""
    tree: dict[str, Any] = {"embedding": embedding_params(config)}
    if config.embed_norm:
        tree["embedding_norm"] = norm_params(config)
    if config.family != "decoder":
        tree["encoder"] = stack_params(config, cross=False)
    if config.family != "encoder":
        tree["decoder"] = stack_params(config, cross=config.family == "encoder_decoder")
    head = head_params(config)
    return tree | {"head": head} if head else tree


class _Table(nn.Module):
    """Parameters that are used as they are."""

    table: Mapping[str, Param]
    shard: Shard

    @nn.compact
    def __call__(self) -> Mapping[str, Array]:
        return self.shard.weights(declare(self, self.table), self.table)


class Pattern(nn.Module):
    """The layers of a block once; `nn.scan` repeats it, so that all repeats are one compiled body."""

    config: ModelConfig
    block: Block
    attend: Attend
    precision: Precision
    experts: ExpertProducts
    remat: Remat
    shard: Shard
    causal: bool
    cross: bool
    train: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], context: Context) -> tuple[Float[Array, "B L D"], Any]:
        loads = {}
        layer = Layer
        if self.remat != "none":
            # A loop keeps the compiler from merging what is recomputed with what was computed; one turn is no loop.
            layer = nn.remat(Layer, policy=policy(self.remat), prevent_cse=self.block.repeats == 1)
        for i, kind in enumerate(self.block.kinds):
            x, load = layer(
                self.config, kind, self.attend, self.shard, causal=self.causal, cross=self.cross, train=self.train,
                precision=self.precision, experts=self.experts, name=f"layer_{i}",
            )(x, context)  # fmt: skip
            if load is not None:
                loads[f"layer_{i}"] = load
        return x, loads


class Stack(nn.Module):
    """The layers of an encoder, or of a decoder, and what surrounds them."""

    config: ModelConfig
    attend: Attend
    precision: Precision
    experts: ExpertProducts
    remat: Remat
    shard: Shard
    causal: bool
    cross: bool
    train: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], context: Context) -> tuple[Float[Array, "B L D"], dict[str, Any]]:
        config = self.config
        relative = config.position == "relative"
        table = _Table(relative_params(config), self.shard, name="relative")()["table"] if relative else None
        context = context._replace(bias=stack_bias(config, table, causal=self.causal))
        loads = {}
        for block in config.blocks():
            name = f"block_{block.first}"
            repeated = nn.scan(
                Pattern, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast, length=block.repeats,  # pyright: ignore[reportArgumentType]  # as its docstring has it
            )  # fmt: skip
            x, found = repeated(
                config, block, self.attend, self.precision, self.experts, self.remat, self.shard,
                causal=self.causal, cross=self.cross, train=self.train, name=name,
            )(x, context)  # fmt: skip
            if found:
                loads[name] = found
        if config.norm_placement != "post":
            x = Norm(config, self.shard, name="final_norm")(x)
        return x, loads


def stack_bias(config: ModelConfig, table: Array | None, *, causal: bool) -> Bias | None:
    """What a stack's layers add to the scores of self-attention."""
    if config.position == "relative":
        assert table is not None
        return Relative(table, both_sides=not causal, max_distance=config.relative_distance)
    if config.position == "alibi":
        return Alibi(config.n_kv_heads, config.n_heads // config.n_kv_heads)
    return None


class Transformer(nn.Module):
    """A batch in, the residual stream before the logits out. Compute dtype is that of the parameters given."""

    config: ModelConfig
    backend: Backend = "xla"
    precision: Precision = "bf16"  # of linear maps; at bf16 and f32 that of the parameters
    experts: ExpertProducts = "loop"  # how dropless ones are multiplied
    remat: Remat = "none"
    shard: Shard = UNSHARDED
    train: bool = False  # whether dropout drops

    @nn.compact
    def __call__(self, batch: Batch) -> Output:
        config, shard = self.config, self.shard
        embed = Embedding(config, shard, name="embedding")
        embed_norm = Norm(config, shard, name="embedding_norm") if config.embed_norm else None
        memory, loads = None, {}

        def read(tokens: Array, positions: Array | None, types: Array | None) -> tuple[Array, Array, Array]:
            if positions is None:
                positions = jnp.asarray(context_order(tokens.shape[1], shard.context_shards))[None]
            x, table_VD = embed(tokens, positions, types)
            x = embed_norm(x) if embed_norm else x
            return nn.Dropout(config.dropout, deterministic=not self.train)(x), positions, table_VD

        def stack(name: str, *, causal: bool, cross: bool) -> Stack:
            attend = partial(attend_by, self.backend, shard=shard)
            return Stack(
                config, attend, self.precision, self.experts, self.remat, shard,
                causal=causal, cross=cross, train=self.train, name=name,
            )  # fmt: skip

        if config.family == "encoder_decoder":
            x, positions, _ = read(batch["source"], batch.get("source_positions"), None)
            context = Context(positions, segments=batch.get("source_segments"))
            memory, loads["encoder"] = stack("encoder", causal=False, cross=False)(x, context)
        x, positions, table_VD = read(batch["inputs"], batch.get("positions"), batch.get("types"))
        context = Context(
            positions, segments=batch.get("segments"), prefix=batch.get("prefix") if config.prefix else None,
            memory=memory, memory_segments=batch.get("source_segments"),
        )  # fmt: skip
        if config.family == "encoder":
            x, loads["encoder"] = stack("encoder", causal=False, cross=False)(x, context)
        else:
            x, loads["decoder"] = stack("decoder", causal=True, cross=memory is not None)(x, context)
        table = head_params(config)
        params = _Table(table, shard, name="head")() if table else {}
        x, head = head_of(config, params, x, table_VD)
        return Output(x, head, {name: found for name, found in loads.items() if found})


def head_of(
    config: ModelConfig, params: Params, x: Float[Array, "B L D"], table_VD: Float[Array, "V D"]
) -> tuple[Float[Array, "B L D"], Head]:
    """The stream before the logits, and the matrix that makes them."""
    if config.head_transform:  # BERT (Devlin et al. 2019; the released code)
        x = jax.nn.gelu(x @ params["w_transform"] + params["b_transform"][None, None], approximate=False)
        x = norm({name: params[f"norm_{name}"] for name in norm_params(config)}, x, config=config)
    return x, Head(table_VD.T if config.tied else params["w_logits"], params.get("b_logits"))


def init(config: ModelConfig, key: PRNGKeyArray) -> dict[str, Any]:
    """Fresh float32 parameters, a plain nested dict."""
    token = jnp.zeros((1, 1), jnp.int32)
    return dict(Transformer(config).init(key, {"inputs": token, "source": token})["params"])


def apply(model: Transformer, params: Mapping[str, Any], batch: Batch, dropout: PRNGKeyArray | None = None) -> Output:
    """The model's output for a batch. `dropout` is the key of a model that trains with it."""
    rngs = {} if dropout is None else {"dropout": dropout}
    out = model.apply({"params": params}, batch, rngs=rngs)
    assert isinstance(out, Output)  # and not a pair: nothing is mutable
    return out


def logits_of(x: Float[Array, "*any D"], head: Head, config: ModelConfig) -> Float[Array, "*any V"]:
    """x W + b, float32, scaled, softly capped (Gemma 2: c tanh(z / c)). Padding rows can never win."""
    logits: Any = to_float32("td,dv->tv", x.reshape(-1, x.shape[-1]), head.w)
    logits = logits.reshape(*x.shape[:-1], -1)
    ones = (1,) * (x.ndim - 1)
    if head.bias is not None:
        logits = logits + head.bias.astype(jnp.float32).reshape(*ones, -1)
    if config.logit_scale is not None:
        logits = logits * config.logit_scale
    if config.logit_cap is not None:
        logits = config.logit_cap * jnp.tanh(logits / config.logit_cap)
    if config.vocab_rows == config.vocab_size:
        return logits
    padding = (jnp.arange(config.vocab_rows) >= config.vocab_size).reshape(*ones, -1)
    return jnp.where(padding, jnp.finfo(jnp.float32).min, logits)


def logits(model: Transformer, params: Mapping[str, Any], batch: Batch) -> Float[Array, "B L V"]:
    """Logits of every position, held all at once: to look at, not to train."""
    out = apply(model, params, batch)
    return logits_of(out.x, out.head, model.config)


def pooled(x: Float[Array, "B L D"], valid: Float[Array, "B L"]) -> Float[Array, "B D"]:
    """One vector of length 1 for a text: the mean over its tokens (Reimers & Gurevych 2019, sec. 3)."""
    mean = (x * valid[:, :, None]).sum(1) / jnp.maximum(valid.sum(1), 1)[:, None]
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-9)


_LIKE = {
    "targets": "inputs", "weights": "inputs", "segments": "inputs", "positions": "inputs", "types": "inputs",
    "source_segments": "source", "source_positions": "source",
}  # fmt: skip
"""Arrays of a batch that have the shape of another."""


def check_batch(config: ModelConfig, batch: Mapping[str, np.ndarray]) -> None:
    """RequestError for a batch that the model cannot read: the array, the value, what was expected.

    On the host, before anything compiles: a compiled lookup would clip what is out of range, and say nothing.
    """
    needed = ("inputs", "source") if config.family == "encoder_decoder" else ("inputs",)
    for name in needed:
        if name not in batch:
            raise RequestError(f"a batch of {', '.join(sorted(batch))}: {config.family} reads {name!r} too")
    for name, array in batch.items():
        like = _LIKE.get(name, name)
        if like in batch and array.shape != batch[like].shape:
            raise RequestError(f"batch[{name!r}] has shape {array.shape}, expected {batch[like].shape} as {like!r}")
    if "source" in batch and len(batch["source"]) != len(batch["inputs"]):
        raise RequestError(
            f"batch['source'] has {len(batch['source'])} rows, expected {len(batch['inputs'])} as 'inputs'"
        )
    for name in ("segments", "source_segments"):
        if name in batch and batch[name].size and batch[name].min() < 0:
            raise RequestError(f"batch[{name!r}] has {batch[name].min()}, expected 0 (padding) or more")
    if "prefix" in batch and batch["prefix"].shape != batch["inputs"].shape[:1]:
        raise RequestError(f"batch['prefix'] has shape {batch['prefix'].shape}, expected {batch['inputs'].shape[:1]}")
    limits = {"inputs": config.vocab_size, "targets": config.vocab_size, "source": config.vocab_size}
    limits |= {"types": config.token_types} if config.token_types else {}
    if config.position == "learned":
        limits |= {"positions": config.max_len, "source_positions": config.max_len}
        for name in needed:
            if batch[name].shape[1] > config.max_len:
                raise RequestError(
                    f"batch[{name!r}] has length {batch[name].shape[1]}, beyond the {config.max_len} learned positions"
                )
    for name, limit in limits.items():
        values = batch.get(name)
        if values is None or not values.size:
            continue
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= limit:
            raise RequestError(f"batch[{name!r}] has {low if low < 0 else high}, expected 0 to {limit - 1}")
