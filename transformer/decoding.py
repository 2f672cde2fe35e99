"""Text from a model: one token after another, or what was hidden in a text."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from transformer.models import Transformer, logits


def sample(
    model: Transformer, params: Mapping[str, Any], prompt: Int[Array, "B P"], key: PRNGKeyArray, *,
    n_tokens: int, temperature: float = 1.0, source: Int[Array, "B S"] | None = None,
) -> Int[Array, "B P+{n_tokens}"]:  # fmt: skip
    """The prompt and `n_tokens` more, each drawn from softmax(logits / temperature); 0 takes the likeliest.

    An encoder-decoder translates `source`; a prefix decoder sees the prompt as a whole. Every token reads the
    whole text so far anew, so the cost grows with the square of the length: for looking at what a model has
    learnt. Prompt and tokens together must not exceed the model's `max_len`.
    """
    B, P = prompt.shape
    assert 0 < P <= model.config.max_len - n_tokens, (P, n_tokens, model.config.max_len)
    tokens = jnp.zeros((B, P + n_tokens), jnp.int32).at[:, :P].set(prompt)
    beside = {} if source is None else {"source": source}
    if model.config.prefix:
        beside["prefix"] = jnp.full(B, P)

    def step(tokens: Int[Array, "B L"], at: Int[Array, ""]) -> tuple[Int[Array, "B L"], None]:
        z = logits(model, params, {"inputs": tokens, **beside})
        z = jax.lax.dynamic_index_in_dim(z, at - 1, axis=1, keepdims=False)
        if temperature == 0:
            drawn = jnp.argmax(z, axis=-1)
        else:
            drawn = jax.random.categorical(jax.random.fold_in(key, at), z / temperature)
        return jax.lax.dynamic_update_index_in_dim(tokens, drawn.astype(jnp.int32), at, axis=1), None

    tokens, _ = jax.lax.scan(step, tokens, jnp.arange(P, P + n_tokens))
    return tokens


def fill(model: Transformer, params: Mapping[str, Any], tokens: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """The likeliest token at every position, by an encoder that sees the whole text."""
    return jnp.argmax(logits(model, params, {"inputs": tokens}), axis=-1).astype(jnp.int32)
