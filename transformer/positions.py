"""How a model knows where a token stands: added to embeddings, turned into queries and keys, or added to scores.

Letters: B batch, L query length, S key length, K kv heads, G queries per kv head, H head size, D model.
"""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from transformer.config import LayerKind, ModelConfig

_STATIC = {"static": True}
_LLAMA3_LOW, _LLAMA3_HIGH = 1.0, 4.0  # turns within the trained length (Grattafiori et al. 2024; params.json)
_YARN_SLOW, _YARN_FAST = 1.0, 32.0  # turns within the trained length (Peng et al. 2023, sec. 3.2: alpha, beta)


def sinusoidal(positions: Int[Array, "B L"], d_model: int) -> Float[Array, "B L {d_model}"]:
    """sin(p / 10000^(2i/D)) at 2i, cos of the same at 2i + 1 (Vaswani et al. 2017, sec. 3.5)."""
    frequency = 10_000.0 ** (-np.arange(0, d_model, 2) / d_model)
    angle = positions[:, :, None].astype(jnp.float32) * jnp.asarray(frequency, jnp.float32)[None, None]
    pairs = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return pairs.reshape(*positions.shape, -1)[..., :d_model]


def rotate(
    x: Float[Array, "B L *heads H"], positions: Int[Array, "#B L"], frequencies: Float[np.ndarray, " R"]
) -> Float[Array, "B L *heads H"]:
    """Rotary position embedding (Su et al. 2021): turn the pair (x_i, x_{i+R}) by position * frequency_i.

    Halves, not neighbours, form the pairs, as in the released Llama weights for Hugging Face. What of a head
    is beyond 2 R stays as it is. float32 inside.
    """
    half = len(frequencies)
    angle = positions[:, :, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)[None, None]
    angle = angle.reshape(*angle.shape[:2], *(1,) * (x.ndim - 3), half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turned, still = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    first, second = jnp.split(turned, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, still], axis=-1) if still.shape[-1] else turned


def _scaling(config: ModelConfig, kind: LayerKind) -> str:
    """Local layers with a theta of their own see no positions that were not trained on."""
    return "none" if kind.local and config.rope_theta_local is not None else config.rope_scaling


def rotary_frequencies(config: ModelConfig, kind: LayerKind) -> Float[np.ndarray, " R"]:
    """theta^(-i/R) for i below R, stretched to positions that were not trained on.

    linear: all by the factor (Chen et al. 2023). llama3: those that make less than one turn within the trained
    length by the factor, those of more than four not, in between both in part (Llama 3.1). yarn: the same with
    1 and 32 turns, in between linear in i (Peng et al. 2023, sec. 3.2).
    """
    n = config.rotating // 2
    theta, scaling = config.rope_theta, _scaling(config, kind)
    if kind.local and config.rope_theta_local is not None:
        theta = config.rope_theta_local
    plain = theta ** (-np.arange(n) / n)
    if scaling == "none":
        return plain
    if scaling == "linear":
        return plain / config.rope_factor
    trained = config.rope_trained_len
    assert trained is not None  # ModelConfig saw to it
    turns = trained * plain / (2 * math.pi)
    if scaling == "llama3":
        kept = np.clip((turns - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW), 0, 1)
    else:
        index_of = [n * math.log(trained / (2 * math.pi * t)) / math.log(theta) for t in (_YARN_FAST, _YARN_SLOW)]
        low, high = max(math.floor(index_of[0]), 0), min(math.ceil(index_of[1]), 2 * n - 1)
        kept = 1 - np.clip((np.arange(n) - low) / max(high - low, 0.001), 0, 1)
    return plain * kept + plain / config.rope_factor * (1 - kept)


def yarn_temperature(config: ModelConfig, kind: LayerKind) -> float:
    """What YaRN multiplies the scores of a layer that it stretches with: (0.1 ln(factor) + 1)^2 (Peng et al. 2023,
    eq. 22). Else 1."""
    return (0.1 * math.log(config.rope_factor) + 1) ** 2 if _scaling(config, kind) == "yarn" and kind.rotates else 1.0


class Bias:
    """What is added to scores by place. Asked as masks are, so that a backend may ask for one block."""

    def __call__(self, queries: Int[Array, " L"], keys: Int[Array, " S"]) -> Float[Array, "K G L S"]:
        """The bias of every head for the queries and keys at those places, float32."""
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Relative(Bias):
    """A learned number for each bucket of distances s - l (Raffel et al. 2020, sec. 2.1; T5's code).

    Half of a side's buckets hold one distance each, the other half grow with its logarithm up to
    `max_distance`; beyond it all share the last. An encoder has one half of the buckets for each side.
    """

    table: Float[Array, "buckets K G"]
    both_sides: bool = field(metadata=_STATIC)
    max_distance: int = field(metadata=_STATIC)

    def __call__(self, queries: Int[Array, " L"], keys: Int[Array, " S"]) -> Float[Array, "K G L S"]:
        distance = queries[:, None] - keys[None]  # behind the query: positive
        n = self.table.shape[0]
        bucket = jnp.zeros_like(distance)
        if self.both_sides:
            n //= 2
            bucket = jnp.where(distance < 0, n, 0)
            distance = jnp.abs(distance)
        distance = jnp.maximum(distance, 0)
        exact = n // 2
        far = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(self.max_distance / exact)
        far = jnp.minimum(exact + (far * (n - exact)).astype(jnp.int32), n - 1)
        bucket = bucket + jnp.where(distance < exact, distance, far)
        return jnp.moveaxis(jnp.take(self.table.astype(jnp.float32), bucket, axis=0), (2, 3), (0, 1))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Alibi(Bias):
    """-slope |l - s|, a slope for each head (Press et al. 2022, sec. 3)."""

    n_kv_heads: int = field(metadata=_STATIC)
    n_groups: int = field(metadata=_STATIC)

    def __call__(self, queries: Int[Array, " L"], keys: Int[Array, " S"]) -> Float[Array, "K G L S"]:
        slopes = alibi_slopes(self.n_kv_heads * self.n_groups).reshape(self.n_kv_heads, self.n_groups)
        distance = jnp.abs(queries[:, None] - keys[None]).astype(jnp.float32)
        return -jnp.asarray(slopes, jnp.float32)[:, :, None, None] * distance[None, None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Regrouped(Bias):
    """The same bias, its heads in n groups."""

    of: Bias
    n: int = field(metadata=_STATIC)

    def __call__(self, queries: Int[Array, " L"], keys: Int[Array, " S"]) -> Float[Array, "K G L S"]:
        added = self.of(queries, keys)
        return added.reshape(self.n, -1, *added.shape[2:])


def alibi_slopes(n_heads: int) -> Float[np.ndarray, " N"]:
    """2^(-8 i / N) for i = 1 ... N where N is a power of 2; else those of the power below it, and of twice
    that power every second one (the paper's released code).

    >>> alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    extra = 2.0 ** (-8 * np.arange(1, 2 * power + 1, 2) / (2 * power))
    return np.concatenate([slopes, extra[: n_heads - power]])
