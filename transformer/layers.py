"""One layer: attention, in a decoder that reads an encoder a second attention, and feed-forward, joined by norms.

Letters: B batch, L length, D model, S length of the memory.
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from transformer.attention import Attend, Attention, Context, attention_params, rms
from transformer.config import ExpertProducts, LayerKind, ModelConfig, Precision
from transformer.experts import Experts, Load, expert_params
from transformer.feed_forward import FeedForward, feed_forward_params
from transformer.masks import Causal, Chunked, Everything, Mask, Prefix, Segments, Window, padding
from transformer.params import Param, Params, ParamTree, declare, ones, zeros
from transformer.placement import Shard
from transformer.remat import LAYER_INPUT


def norm_params(config: ModelConfig) -> Mapping[str, Param]:
    """RMSNorm has a scale, LayerNorm a bias too, but for models that leave it out."""
    scale = {"scale": Param((config.d_model,), ("channel",), ones)}
    if config.norm == "rms" or not config.norm_bias:
        return scale
    return scale | {"bias": Param((config.d_model,), ("channel",), zeros)}


def norm(params: Params, x: Float[Array, "B L D"], *, config: ModelConfig) -> Float[Array, "B L D"]:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019), in float32.

    LayerNorm: (x - mean) / sqrt(var + eps) * scale + bias. RMSNorm: x / sqrt(mean(x^2) + eps) * scale.
    """
    x32 = x.astype(jnp.float32)
    if config.norm == "layer":
        x32 = x32 - x32.mean(-1, keepdims=True)
    x32 = rms(x32, params["scale"], config.norm_eps)
    if "bias" in params:
        x32 = x32 + params["bias"].astype(jnp.float32)[None, None]
    return x32.astype(x.dtype)


class Norm(nn.Module):
    """Names and initialises the parameters of `norm`."""

    config: ModelConfig
    shard: Shard

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        table = norm_params(self.config)
        return norm(self.shard.weights(declare(self, table), table), x, config=self.config)


def self_mask(config: ModelConfig, kind: LayerKind, context: Context, *, causal: bool) -> Mask:
    """What a layer's self-attention may see: its stack's pattern, of it what is near, of that the same text."""
    mask: Mask = Causal() if causal else Everything()
    if context.prefix is not None:
        mask = mask | Prefix(context.prefix)
    if kind.local:
        mask = mask & (Window(config.window) if config.window else Chunked(config.chunk or 1))
    if context.segments is not None:
        mask = mask & Segments(context.segments, context.segments)
    return mask


def cross_mask(context: Context) -> Mask:
    """What cross-attention may see: all of the memory but its padding; of packed texts the one that is the query's."""
    if context.memory_segments is None:
        return Everything()
    if context.segments is None:
        return padding(context.memory_segments > 0, context.positions.shape[1])
    return Segments(context.segments, context.memory_segments)


def layer_params(config: ModelConfig, kind: LayerKind, *, cross: bool) -> ParamTree:
    """Every parameter of a layer, shaped as `Layer` declares them."""
    parts: dict[str, Mapping[str, Param]] = {"attention": attention_params(config)}
    if cross:
        parts["cross"] = attention_params(config, cross=True)
    parts |= {"experts": expert_params(config)} if kind.experts else {"ffn": feed_forward_params(config)}
    norms = {f"{name}_norm": norm_params(config) for name in parts}
    if config.parallel and not config.parallel_norms:
        del norms["experts_norm" if kind.experts else "ffn_norm"]
    if config.norm_placement == "sandwich":
        norms |= {f"{name}_after": norm_params(config) for name in parts}
    return parts | norms


def between(x: Float[Array, "B L D"], shard: Shard) -> Float[Array, "B L D"]:
    """The stream between what reads it: no device has a position that another has too."""
    return shard.leave(x)


class Layer(nn.Module):
    """Attention, cross-attention where there is a memory to read, feed-forward or experts, each added to the stream.

    pre:       x + f(norm(x))            GPT-2, Llama (Xiong et al. 2020)
    post:      norm(x + f(x))            the original Transformer, BERT (Vaswani et al. 2017, sec. 3.1)
    sandwich:  x + norm(f(norm(x)))      Gemma 2, Grok 1 (Ding et al. 2021, CogView)
    parallel:  x + f(norm(x)) + g(norm(x)), attention and feed-forward side by side (GPT-J; PaLM, sec. 2)

    `causal` makes it a decoder's layer, without it an encoder's.
    """

    config: ModelConfig
    kind: LayerKind
    attend: Attend
    shard: Shard
    causal: bool
    cross: bool
    train: bool
    precision: Precision = "bf16"
    experts: ExpertProducts = "loop"

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], context: Context) -> tuple[Float[Array, "B L D"], Load | None]:
        """The stream after the layer, and where it has experts how their choice fell."""
        config, shard = self.config, self.shard
        x = checkpoint_name(x, LAYER_INPUT)
        self_attention = Attention(config, self.kind, self.attend, shard, precision=self.precision, name="attention")
        load: Load | None = None

        def attend(h: Array) -> Array:
            return self_attention(h, self_mask(config, self.kind, context, causal=self.causal), context)

        def feed(h: Array) -> Array:
            nonlocal load
            if not self.kind.experts:
                return FeedForward(config, shard, self.precision, name="ffn")(h)
            segments = context.segments
            valid = jnp.ones(h.shape[:2]) if segments is None else (segments > 0).astype(jnp.float32)
            out, load = Experts(config, shard, self.precision, self.experts, name="experts")(h, valid)
            return out

        second = "experts" if self.kind.experts else "ffn"
        if config.parallel:
            h = shard.enter(Norm(config, shard, name="attention_norm")(x))
            h2 = shard.enter(Norm(config, shard, name=f"{second}_norm")(x)) if config.parallel_norms else h
            return x + self._dropped(between(attend(h) + feed(h2), shard)), load
        x = self._add(x, "attention", attend)
        if self.cross:
            read = Attention(config, self.kind, self.attend, shard, True, self.precision, name="cross")
            x = self._add(x, "cross", lambda h: read(h, cross_mask(context), context))
        return self._add(x, second, feed), load

    def _add(self, x: Array, name: str, function: Callable[[Array], Array]) -> Array:
        config, shard = self.config, self.shard
        before = Norm(config, shard, name=f"{name}_norm")
        if config.norm_placement == "post":
            x = before(x + self._dropped(between(function(shard.enter(x)), shard)))
        else:
            y = between(function(shard.enter(before(x))), shard)
            if config.norm_placement == "sandwich":
                y = Norm(config, shard, name=f"{name}_after")(y)
            x = x + self._dropped(y)
        return x

    def _dropped(self, x: Array) -> Array:
        return nn.Dropout(self.config.dropout, deterministic=not self.train)(x)
