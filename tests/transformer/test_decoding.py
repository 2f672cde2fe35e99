"""Sampling: the likeliest token, the distribution, what is read beside the text; and filling in."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.config import ModelConfig
from transformer.decoding import fill, sample
from transformer.models import Transformer, logits

pytestmark = pytest.mark.usefixtures("strict_dtypes")

LLAMA = ModelConfig(
    n_layers=2, d_model=14, n_heads=6, n_kv_heads=3, d_head=4, d_ff=22, vocab_size=13, max_len=9, vocab_multiple=8
)
CONFIGS = {
    "gpt": dataclasses.replace(LLAMA, position="learned", norm="layer", ffn="gelu", bias=True, tied=True, window=4),
    "prefix": dataclasses.replace(LLAMA, prefix=True),
    "translator": dataclasses.replace(LLAMA, family="encoder_decoder", position="relative", n_layers=1),
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 13, (2, 7)), jnp.int32)


@pytest.mark.parametrize("name", CONFIGS)
def test_temperature_0_takes_the_likeliest(name, random_params):
    config = CONFIGS[name]
    params, model = random_params(config), Transformer(config)
    beside = {"source": TOKENS[:, 2:]} if name == "translator" else {}
    got = sample(model, params, TOKENS[:, :3], jax.random.key(0), n_tokens=4, temperature=0, **beside)
    if name == "prefix":
        beside = {"prefix": jnp.asarray([3, 3])}  # the prompt sees all of itself
    read = jax.jit(lambda tokens: logits(model, params, {"inputs": tokens, **beside}))
    want = np.array(TOKENS)  # what stands behind the end does not matter: the model sees no future
    for end in range(3, 7):
        want[:, end] = read(jnp.asarray(want))[:, end - 1].argmax(-1)
    np.testing.assert_array_equal(got, want)


def test_samples_follow_the_distribution(random_params):
    """One layer of zeros leaves the embedding: logits that are known, drawn 4,000 times."""
    config = ModelConfig(
        n_layers=1, d_model=2, n_heads=1, n_kv_heads=1, d_head=2, d_ff=2, vocab_size=3, max_len=2, vocab_multiple=4
    )
    params = jax.tree.map(jnp.zeros_like, random_params(config))
    params["embedding"]["tokens"] = jnp.ones((4, 2))
    params["decoder"]["final_norm"]["scale"] = jnp.ones(2)
    params["head"]["w_logits"] = jnp.asarray([[0.0, 1, 2, 9], [0, 0, 0, 0]])
    prompt = jnp.zeros((4000, 1), jnp.int32)
    for temperature in (1.0, 2.0):
        drawn = sample(Transformer(config), params, prompt, jax.random.key(0), n_tokens=1, temperature=temperature)
        share = np.bincount(drawn[:, 1], minlength=3) / 4000
        want = np.exp(np.arange(3) / temperature) / np.exp(np.arange(3) / temperature).sum()
        np.testing.assert_allclose(share, want, atol=0.03)


def test_another_key_draws_other_tokens(random_params):
    model, params = Transformer(LLAMA), jax.tree.map(jnp.zeros_like, random_params(LLAMA))
    draw = jax.jit(lambda key: sample(model, params, TOKENS[:, :1], key, n_tokens=8))
    drawn = [draw(jax.random.key(k)) for k in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    assert len(set(np.ravel(drawn))) > 8  # of 13 equally likely ones: no token draws by the same number
    np.testing.assert_array_equal(drawn[0][:, :1], TOKENS[:, :1])


def test_sample_needs_room():
    with pytest.raises(AssertionError, match=r"\(3, 7, 9\)"):
        sample(Transformer(LLAMA), {}, TOKENS[:, :3], jax.random.key(0), n_tokens=7)


def test_an_encoder_fills_in_the_likeliest_everywhere(random_params):
    config = dataclasses.replace(LLAMA, family="encoder")
    model, params = Transformer(config), random_params(config)
    got, want = jax.jit(lambda: (fill(model, params, TOKENS), logits(model, params, {"inputs": TOKENS})))()
    np.testing.assert_array_equal(got, want.argmax(-1))
    assert got.dtype == jnp.int32
