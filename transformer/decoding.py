"""Text from a model: one token after another."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from transformer.models import Decoder, apply


def sample(
    model: Decoder, params: Mapping[str, Any], prompt: Int[Array, "B P"], key: PRNGKeyArray, *,
    n_tokens: int, temperature: float = 1.0,
) -> Int[Array, "B P+{n_tokens}"]:  # fmt: skip
    """The prompt and `n_tokens` more, each drawn from softmax(logits / temperature); 0 takes the likeliest.

    Every token reads the whole text so far anew, so the cost grows with the square of the length: for looking
    at what a model has learnt. Prompt and tokens together must not exceed the model's `max_len`.
    """
    B, P = prompt.shape
    assert 0 < P <= model.config.max_len - n_tokens, (P, n_tokens, model.config.max_len)
    tokens = jnp.zeros((B, P + n_tokens), jnp.int32).at[:, :P].set(prompt)

    def step(tokens: Int[Array, "B L"], at: Int[Array, ""]) -> tuple[Int[Array, "B L"], None]:
        logits = jax.lax.dynamic_index_in_dim(apply(model, params, tokens), at - 1, axis=1, keepdims=False)
        if temperature == 0:
            drawn = jnp.argmax(logits, axis=-1)
        else:
            drawn = jax.random.categorical(jax.random.fold_in(key, at), logits / temperature)
        return jax.lax.dynamic_update_index_in_dim(tokens, drawn.astype(jnp.int32), at, axis=1), None

    tokens, _ = jax.lax.scan(step, tokens, jnp.arange(P, P + n_tokens))
    return tokens
