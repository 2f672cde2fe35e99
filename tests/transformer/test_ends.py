"""Where a model begins and ends: embeddings, the head, one vector for a text, and what a batch must be."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.config import ModelConfig
from transformer.errors import RequestError
from transformer.layers import norm
from transformer.models import Head, Transformer, apply, check_batch, logits_of, pooled
from transformer.positions import sinusoidal

pytestmark = pytest.mark.usefixtures("strict_dtypes")

MODEL = ModelConfig(
    n_layers=1, d_model=14, n_heads=2, n_kv_heads=1, d_head=4, d_ff=5, vocab_size=13, max_len=9, vocab_multiple=8
)
RNG = np.random.default_rng(0)
TOKENS, TYPES = (jnp.asarray(RNG.integers(0, n, (2, 7)), jnp.int32) for n in (13, 3))
PLACES = jnp.asarray([[0, 1, 2, 0, 1, 2, 3], [4, 3, 2, 1, 0, 8, 7]])


def closed(params: Any) -> Any:
    """Layers that add nothing to the stream."""
    return jax.tree_util.tree_map_with_path(
        lambda path, p: jnp.zeros_like(p) if path[-1].key in ("w_o", "w_down", "b_o", "b_down") else p, params
    )


@pytest.mark.parametrize(
    ("changes", "batch"),
    [
        ({}, {}),
        ({"embed_scale": True}, {}),
        ({"position": "learned"}, {}),
        ({"position": "learned"}, {"positions": PLACES}),
        ({"position": "sinusoidal", "embed_scale": True}, {"positions": PLACES}),
        ({"token_types": 3}, {}),
        ({"token_types": 3}, {"types": TYPES}),
        ({"embed_norm": True, "norm": "layer"}, {}),
    ],
    ids=str,
)
def test_embedding_is_the_sum_of_what_the_model_has(changes, batch, random_params):
    """Token, times sqrt(d_model) or not, and place, and type; then its norm. Closed layers leave the final norm."""
    config = dataclasses.replace(MODEL, **changes)
    params = closed(random_params(config))
    table, places = params["embedding"], batch.get("positions", jnp.arange(7)[None])
    x = np.asarray(table["tokens"])[TOKENS] * (math.sqrt(14) if config.embed_scale else 1)
    if config.position == "learned":
        x = x + np.asarray(table["positions"])[places]
    if config.position == "sinusoidal":
        x = x + np.asarray(sinusoidal(places, 14))
    if config.token_types:
        x = x + np.asarray(table["types"])[batch.get("types", jnp.zeros((2, 7), jnp.int32))]
    if config.embed_norm:
        x = norm(params["embedding_norm"], jnp.asarray(x), config=config)
    want = norm(params["decoder"]["final_norm"], jnp.asarray(x, jnp.float32), config=config)
    got = jax.jit(lambda p: apply(Transformer(config), p, {"inputs": TOKENS, **batch}).x)(params)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_a_translators_two_texts_share_the_table_and_have_places_of_their_own(random_params):
    """What is read is the source; its places change nothing but through their embedding."""
    config = dataclasses.replace(MODEL, family="encoder_decoder", position="learned")
    params = random_params(config)
    source = TOKENS[:, :5]
    read = jax.jit(lambda p, **batch: apply(Transformer(config), p, {"inputs": TOKENS, "source": source, **batch}).x)
    plain = read(params)
    np.testing.assert_array_equal(read(params, source_positions=jnp.arange(5)[None].repeat(2, 0)), plain)
    assert not np.allclose(read(params, source_positions=jnp.arange(5)[None].repeat(2, 0) + 1), plain)
    flat = params | {"embedding": params["embedding"] | {"positions": jnp.zeros((9, 14))}}
    np.testing.assert_array_equal(read(flat, source_positions=PLACES[:, :5], positions=PLACES), read(flat))


def test_dropout_reaches_the_embeddings(random_params):
    """Closed layers leave the embedding, of which half is 0 and the rest doubled, before the final norm."""
    config = dataclasses.replace(MODEL, dropout=0.5, norm="layer", norm_bias=False)
    params = closed(random_params(config))
    params["decoder"]["final_norm"]["scale"] = jnp.ones(14)

    def read(train: bool, key: int) -> jax.Array:
        model = Transformer(config, train=train)
        return jax.jit(lambda p, k: apply(model, p, {"inputs": TOKENS}, k).x)(params, jax.random.key(key))

    still = read(False, 0)
    np.testing.assert_array_equal(read(False, 1), still)
    first, second = read(True, 0), read(True, 1)
    assert not np.allclose(first, still)
    assert not np.allclose(first, second)
    at_zero = [len(np.unique(np.round(row, 4))) < 14 for row in np.asarray(first).reshape(-1, 14)]
    assert np.mean(at_zero) > 0.9  # several numbers of a token are the same: those that were 0


@pytest.mark.parametrize(
    "changes",
    [{}, {"head_bias": True}, {"logit_scale": 0.3}, {"logit_cap": 2.0}, {"head_bias": True, "logit_scale": 3.0, "logit_cap": 2.0}],
    ids=str,
)  # fmt: skip
def test_logits_are_scaled_and_then_capped(changes):
    config = dataclasses.replace(MODEL, **changes)
    x, w, b = RNG.normal(size=(2, 3, 14)), RNG.normal(size=(14, 16)), RNG.normal(size=16)
    want = (x @ w + (b if config.head_bias else 0)) * (config.logit_scale or 1)
    want = want if config.logit_cap is None else config.logit_cap * np.tanh(want / config.logit_cap)
    head = Head(jnp.asarray(w, jnp.float32), jnp.asarray(b, jnp.float32) if config.head_bias else None)
    got = logits_of(jnp.asarray(x, jnp.float32), head, config)
    np.testing.assert_allclose(got[..., :13], want[..., :13], rtol=1e-4, atol=1e-5)
    assert float(got[..., 13:].max()) == np.finfo(np.float32).min
    one = logits_of(jnp.asarray(x[0, 0], jnp.float32), head, config)
    np.testing.assert_allclose(one, got[0, 0], rtol=1e-4, atol=1e-5)


def test_a_transformed_head_is_that_of_bert(random_params):
    """Dense, exact GELU, norm, and only then the table (Devlin et al. 2019, the released code)."""
    config = dataclasses.replace(
        MODEL, family="encoder", head_transform=True, tied=True, norm="layer", norm_placement="post", head_bias=True
    )
    bare = dataclasses.replace(config, head_transform=False)
    params = random_params(config)
    out, x = (
        jax.jit(lambda p, c=c: apply(Transformer(c), p, {"inputs": TOKENS}))(params) for c in (config, bare)
    )  # fmt: skip
    h = np.asarray(x.x @ params["head"]["w_transform"]) + np.asarray(params["head"]["b_transform"])
    h = h / 2 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
    names = {"scale": params["head"]["norm_scale"], "bias": params["head"]["norm_bias"]}
    np.testing.assert_allclose(out.x, norm(names, jnp.asarray(h, jnp.float32), config=config), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(out.head.w, params["embedding"]["tokens"].T)
    np.testing.assert_array_equal(out.head.bias, params["head"]["b_logits"])


def test_pooled_is_the_mean_of_the_tokens_at_length_1():
    x = jnp.asarray([[[1.0, 2], [5, 2], [99, 99]], [[3, 4], [9, 9], [9, 9]]])
    got = pooled(x, jnp.asarray([[1.0, 1, 0], [1, 0, 0]]))
    np.testing.assert_allclose(got, [[3 / 13**0.5, 2 / 13**0.5], [0.6, 0.8]], rtol=1e-6)
    assert bool(jnp.isfinite(pooled(x, jnp.zeros((2, 3)))).all())


LEARNED = dataclasses.replace(MODEL, position="learned")
PAIRS = dataclasses.replace(MODEL, family="encoder_decoder", position="learned")
TYPED = dataclasses.replace(MODEL, token_types=3)
PREFIX = dataclasses.replace(MODEL, prefix=True)


def of(**changes: Any) -> dict[str, np.ndarray]:
    return {"inputs": np.zeros((2, 7), np.int32), "targets": np.zeros((2, 7), np.int32), **changes}


@pytest.mark.parametrize(
    ("config", "batch", "message"),
    [
        (MODEL, {"targets": np.zeros((2, 7), int)}, "a batch of targets: decoder reads 'inputs' too"),
        (MODEL, of(targets=np.zeros((2, 6), int)), "batch['targets'] has shape (2, 6), expected (2, 7) as 'inputs'"),
        (MODEL, of(segments=np.zeros((1, 7), int)), "batch['segments'] has shape (1, 7), expected (2, 7) as 'inputs'"),
        (MODEL, of(positions=np.zeros((7,), int)), "batch['positions'] has shape (7,), expected (2, 7) as 'inputs'"),
        (MODEL, of(types=np.zeros((2, 8), int)), "batch['types'] has shape (2, 8), expected (2, 7) as 'inputs'"),
        (MODEL, of(weights=np.zeros((2, 8))), "batch['weights'] has shape (2, 8), expected (2, 7) as 'inputs'"),
        (MODEL, of(inputs=np.full((2, 7), 13)), "batch['inputs'] has 13, expected 0 to 12"),
        (MODEL, of(targets=np.full((2, 7), -1)), "batch['targets'] has -1, expected 0 to 12"),
        (TYPED, of(types=np.full((2, 7), 3)), "batch['types'] has 3, expected 0 to 2"),
        (LEARNED, of(positions=np.full((2, 7), 9)), "batch['positions'] has 9, expected 0 to 8"),
        (LEARNED, of(inputs=np.zeros((2, 10), int), targets=np.zeros((2, 10), int)), "batch['inputs'] has length 10, beyond the 9 learned positions"),
        (PAIRS, of(), "a batch of inputs, targets: encoder_decoder reads 'source' too"),
        (PAIRS, of(source=np.zeros((3, 9), int)), "batch['source'] has 3 rows, expected 2 as 'inputs'"),
        (PAIRS, of(source=np.zeros((2, 9), int), source_segments=np.full((2, 9), -1)), "batch['source_segments'] has -1, expected 0 (padding) or more"),
        (PAIRS, of(source=np.zeros((2, 11), int)), "batch['source'] has length 11, beyond the 9 learned positions"),
        (PAIRS, of(source=np.full((2, 5), 99)), "batch['source'] has 99, expected 0 to 12"),
        (PAIRS, of(source=np.zeros((2, 5), int), source_segments=np.zeros((2, 7), int)), "batch['source_segments'] has shape (2, 7), expected (2, 5) as 'source'"),
        (PAIRS, of(source=np.zeros((2, 5), int), source_positions=np.full((2, 5), 9)), "batch['source_positions'] has 9, expected 0 to 8"),
        (PREFIX, of(prefix=np.zeros((2, 7), int)), "batch['prefix'] has shape (2, 7), expected (2,)"),
    ],
)  # fmt: skip
def test_a_batch_that_cannot_be_read_is_refused_naming_both_sides(config, batch, message):
    with pytest.raises(RequestError) as caught:
        check_batch(config, batch)
    assert str(caught.value) == message


def test_a_batch_that_can_be_read_passes():
    check_batch(MODEL, of(inputs=np.full((2, 7), 12), weights=np.ones((2, 7))))
    check_batch(MODEL, of(inputs=np.zeros((2, 99), int), targets=np.zeros((2, 99), int)))  # rotation has no end
    check_batch(MODEL, of(positions=np.full((2, 7), 99), segments=np.full((2, 7), 99)))
    check_batch(PAIRS, of(source=np.full((2, 9), 12), source_positions=np.zeros((2, 9), int)))
    check_batch(PREFIX, of(prefix=np.zeros(2, int)))
    check_batch(TYPED, {"inputs": np.zeros((2, 7), int), "types": np.full((2, 7), 2)})
