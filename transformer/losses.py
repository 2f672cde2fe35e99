"""What training makes small: cross-entropy that never holds all logits, and how evenly experts are used.

Letters: B batch, L length, D model, V vocabulary as stored (padded); P groups of devices that hold
different sequences, C parts of a sequence on different devices, t tokens of a chunk.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer.config import ModelConfig
from transformer.experts import Load
from transformer.models import Head, logits_of
from transformer.placement import Shard

CHUNK_TOKENS = 4096
"""Tokens of a device whose logits are held at once: enough to use a matrix unit fully, and no more than
2 GB of float32 for the largest vocabularies."""


def cross_entropy(
    x: Float[Array, "B L D"], head: Head, targets: Int[Array, "B L"], weights: Float[Array, "B L"], *,
    config: ModelConfig, shard: Shard,
) -> Float[Array, ""]:  # fmt: skip
    """Sum over tokens of weight * (-log softmax(z)[target]), in nats; z are the logits.

    With label smoothing e the target is 1 - e + e / V at the token and e / V elsewhere (Szegedy et al. 2016, sec. 7).
    z-loss adds c log(sum exp z)^2, which keeps logits from drifting (PaLM, sec. 5).

    Works through chunks of positions. Where a gradient is asked for it is computed with each chunk's loss, so
    that its logits are made once and forgotten (Hsu et al. 2024, Liger; Wijmans et al. 2024): FLOPs stay 6 D V
    a token. The head's gradient adds up on every device by itself and travels once.
    """
    x = shard.enter(x)
    return _summed(x, head.w, head.bias, targets, weights.astype(jnp.float32), config, shard)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _summed(x: Any, w: Any, bias: Any, targets: Any, weights: Any, config: ModelConfig, shard: Shard) -> Array:
    parts, w, bias = _prepared(x, w, bias, targets, weights, shard)

    def add(total: Array, part: Any) -> tuple[Array, None]:
        return total + _chunk_loss(part[0], w, bias, *part[1:], config=config, shard=shard), None

    return jax.lax.scan(add, jnp.zeros(()), parts)[0]


def _summed_forward(
    x: Any, w: Any, bias: Any, targets: Any, weights: Any, config: ModelConfig, shard: Shard
) -> tuple[Array, Any]:
    parts, w_PCDV, bias_PCV = _prepared(x, w, bias, targets, weights, shard)
    loss_of = jax.value_and_grad(partial(_chunk_loss, config=config, shard=shard), argnums=(0, 1, 2))

    def add(total: Any, part: Any) -> tuple[Any, Array]:
        loss, (dx, *grads) = loss_of(part[0], w_PCDV, bias_PCV, *part[1:])
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        return jax.tree.map(jnp.add, total, (loss, grads)), dx

    zero = jax.tree.map(lambda t: jnp.zeros(t.shape, jnp.float32), [w_PCDV, bias_PCV])
    zero[0] = shard.activation(zero[0], "batch", "length", "channel", "vocab")
    (loss, (dw, dbias)), dx = jax.lax.scan(add, (jnp.zeros(()), zero), parts)
    B, L, D = x.shape
    P, C = shard.batch_shards, shard.context_shards
    dx = jnp.moveaxis(dx, 0, 2).reshape(P, C, -1, D)[:, :, : B * L // (P * C)]  # n P C t D -> P C tokens D
    dx = dx.reshape(P, C, B // P, L // C, D).swapaxes(1, 2).reshape(B, L, D)
    dw = shard.summed(dw.astype(w.dtype), "embed", "vocab")
    dbias = None if bias is None else shard.summed(dbias.astype(bias.dtype), "vocab")
    return loss, (dx, dw, dbias)


def _summed_backward(config: ModelConfig, shard: Shard, grads: Any, given: Array) -> tuple[Any, ...]:
    dx, dw, dbias = jax.tree.map(lambda g: (g.astype(jnp.float32) * given).astype(g.dtype), grads)
    return dx, dw, dbias, None, None


_summed.defvjp(_summed_forward, _summed_backward)


def _prepared(x: Array, w: Array, bias: Any, targets: Array, weights: Array, shard: Shard) -> tuple[Any, Array, Any]:
    """Chunks of tokens in front, what devices hold next; and to each of them the head by itself."""
    P, C = shard.batch_shards, shard.context_shards
    n_tokens = targets.size // (P * C)
    n = -(-n_tokens // CHUNK_TOKENS)
    chunk = -(-n_tokens // n)

    def cut(t: Array) -> Array:
        t = t.reshape(P, -1, C, t.shape[1] // C, *t.shape[2:]).swapaxes(1, 2)
        t = t.reshape(P, C, n_tokens, *t.shape[4:])
        t = jnp.pad(t, [(0, 0), (0, 0), (0, n * chunk - n_tokens)] + [(0, 0)] * (t.ndim - 3))
        return jnp.moveaxis(t.reshape(P, C, n, chunk, *t.shape[3:]), 2, 0)

    return (
        (cut(x), cut(targets), cut(weights)),
        shard.own(w, "embed", "vocab"),
        None if bias is None else shard.own(bias, "vocab"),
    )


def _chunk_loss(
    x: Float[Array, "P C t D"], w: Float[Array, "P C D V"], bias: Float[Array, "P C V"] | None,
    targets: Int[Array, "P C t"], weights: Float[Array, "P C t"], *, config: ModelConfig, shard: Shard,
) -> Float[Array, ""]:  # fmt: skip
    def placed(z: Array) -> Array:
        return shard.activation(z, "batch", "length", "channel", "vocab")

    z = placed(jax.vmap(jax.vmap(lambda x, w, b: logits_of(x, Head(w, b), config)))(x, w, bias))
    # The target's logit is picked by comparison, not by index: an index into a split vocabulary would gather
    # the logits, a comparison is local and fuses.
    hit = jnp.arange(config.vocab_rows)[None, None, None] == targets[..., None]
    log_z = jax.nn.logsumexp(z, axis=-1)
    e = config.label_smoothing
    loss = log_z - (1 - e) * jnp.where(hit, z, 0).sum(-1)
    if e:
        real = (jnp.arange(config.vocab_rows) < config.vocab_size)[None, None, None]
        loss = loss - e / config.vocab_size * jnp.where(real, z, 0).sum(-1)
    if config.z_loss:
        loss = loss + config.z_loss * jnp.square(log_z)
    return (loss * weights).sum()


def balance(loads: Any) -> Float[Array, ""]:
    """Sum over layers of how unevenly their experts are used: 1 a layer when even (experts.load_of)."""
    found = [t for t in jax.tree.leaves(loads, is_leaf=lambda t: isinstance(t, Load)) if isinstance(t, Load)]
    return sum((load.balance.sum() for load in found), jnp.zeros(()))
