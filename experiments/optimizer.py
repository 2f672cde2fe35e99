"""AdamW, and how its updates are added to parameters of 32 bit, or of 16 by chance."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from transformer.params import ParamTree, map_params
from transformer.sharding import MATRIX_DIMS


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay to a tenth, gradients clipped by global norm."""

    learning_rate: float = 3e-4
    warmup_steps: int = 100
    total_steps: int = 10_000
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def make(self, table: ParamTree) -> optax.GradientTransformation:
        """The schedule reaches its peak after `warmup_steps`, and a tenth of it at `total_steps`.

        Matrices decay, norms and biases do not. Every matrix has the residual stream as one of its sides;
        the number of dims would not tell, as heads and stacked layers give vectors several.
        """
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, self.warmup_steps, max(self.total_steps, self.warmup_steps + 1),
            end_value=self.learning_rate / 10,
        )  # fmt: skip
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.adamw(
                schedule, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay,
                mask=map_params(lambda p: not set(MATRIX_DIMS).isdisjoint(p.dims), table),
            ),
        )  # fmt: skip


def stochastic(key: PRNGKeyArray, x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """float32 to bfloat16: up or down, each as likely as the other neighbour is far, so that the mean is x (Gupta et
    al. 2015, sec. 3). The lower half of x's bits, to which a random number is added, carries or is cut off."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def added(params: Any, updates: Any, key: PRNGKeyArray) -> Any:
    """Parameters after their updates, float32 or rounded by chance to what they are, each with a key of its own."""
    leaves, tree = jax.tree.flatten(params)
    sums = [p.astype(jnp.float32) + u for p, u in zip(leaves, jax.tree.leaves(updates), strict=True)]
    keys = [jax.random.fold_in(key, i) for i in range(len(sums))]
    pairs = zip(leaves, sums, keys, strict=True)
    return tree.unflatten([new if p.dtype == new.dtype else stochastic(k, new) for p, new, k in pairs])
