"""What reaches what in a whole model: the future, windows, chunks, prefixes, and texts packed into one row."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.config import ModelConfig
from transformer.models import Transformer, logits

pytestmark = pytest.mark.usefixtures("strict_dtypes")

L = 8
BASE = ModelConfig(
    n_layers=2, d_model=14, n_heads=4, n_kv_heads=2, d_head=4, d_ff=10, vocab_size=13, max_len=L, vocab_multiple=1
)
MULTI = dataclasses.replace(BASE, n_kv_heads=4)
RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.permutation(13)[:L], jnp.int32)
OTHER = (TOKENS + 5) % 13
FUTURE = np.tril(np.ones((L, L), bool))  # [query, key]: what a decoder's layer sees
PLACES = np.arange(L)


def near(size: int) -> np.ndarray:
    return abs(PLACES[:, None] - PLACES) < size


def chunks(size: int) -> np.ndarray:
    return PLACES[:, None] // size == PLACES // size


def reader(config: ModelConfig, params: Any):
    return jax.jit(lambda batch: logits(Transformer(config), params, batch))


def influence(read: Any, name: str, n_queries: int, beside: dict[str, Any] | None = None) -> np.ndarray:
    """[query, key]: whether another token at the key changes the logits at the query, all keys in one batch."""
    beside = {k: jnp.repeat(v[None], L + 1, 0) for k, v in (beside or {}).items()}
    rows = jnp.stack([TOKENS, *(TOKENS.at[s].set(OTHER[s]) for s in range(L))])
    z = np.asarray(read({"inputs": TOKENS[None].repeat(L + 1, 0), **beside, name: rows}))
    assert z.shape[1] == n_queries
    return (np.abs(z[1:] - z[0]) > 1e-6).any(-1).T


CAUSAL: dict[str, tuple[ModelConfig, list[np.ndarray]]] = {  # what each layer sees
    "rotary": (BASE, [FUTURE, FUTURE]),
    "window": (dataclasses.replace(MULTI, window=3, position="learned", norm="layer", bias=True), [FUTURE & near(3)] * 2),
    "chunk": (dataclasses.replace(BASE, chunk=3, position="sinusoidal", score="cosine"), [FUTURE & chunks(3)] * 2),
    "window, then global": (dataclasses.replace(BASE, n_layers=3, window=2, global_every=3, no_rope_every=3, norm_placement="sandwich"), [FUTURE & near(2)] * 2 + [FUTURE]),
    "one window": (dataclasses.replace(BASE, n_layers=1, window=2, parallel=True, position="none"), [FUTURE & near(2)]),
    "alibi": (dataclasses.replace(MULTI, share="query_key", position="alibi", norm_placement="post", sinks=True), [FUTURE] * 2),
    "relative": (dataclasses.replace(BASE, position="relative", score="additive", relative_buckets=6, relative_distance=9), [FUTURE] * 2),
    "latent, experts": (dataclasses.replace(MULTI, kv_rank=5, d_rope=2, n_experts=4, experts_per_token=2), [FUTURE] * 2),
}  # fmt: skip


@pytest.mark.parametrize("name", CAUSAL)
def test_a_token_of_a_decoder_changes_what_its_layers_hand_on_and_nothing_else(name, random_params):
    config, layers = CAUSAL[name]
    reach = np.eye(L, dtype=bool)
    for seen in layers:
        reach = seen @ reach  # a query has of the layer below what its keys have
    got = influence(reader(config, random_params(config)), "inputs", L)
    np.testing.assert_array_equal(got, reach)
    assert not got[np.triu_indices(L, 1)].any()


def test_a_full_expert_drops_no_token_for_a_later_one(random_params):
    """Capacity is taken in the order of the text."""
    config = dataclasses.replace(BASE, n_experts=3, capacity_factor=0.5)
    got = influence(reader(config, random_params(config)), "inputs", L)
    assert not got[np.triu_indices(L, 1)].any()
    assert got.diagonal().all()


@pytest.mark.smoke
def test_a_prefix_sees_all_of_itself_and_the_rest_sees_what_was_before(random_params):
    config = dataclasses.replace(BASE, n_layers=1, prefix=True)
    read = reader(config, random_params(config))
    for length in (0, 1, 5):
        want = FUTURE | (length > PLACES)
        np.testing.assert_array_equal(influence(read, "inputs", L, {"prefix": jnp.asarray(length)}), want)


def test_an_encoder_sees_both_sides(random_params):
    every, local = (dataclasses.replace(BASE, family="encoder", n_layers=1, window=w) for w in (None, 3))
    np.testing.assert_array_equal(influence(reader(every, random_params(every)), "inputs", L), np.ones((L, L)))
    np.testing.assert_array_equal(influence(reader(local, random_params(local)), "inputs", L), near(3))


def test_a_translators_decoder_sees_all_of_the_source_and_no_future(random_params):
    config = dataclasses.replace(BASE, family="encoder_decoder", n_layers=1, window=2)
    read = reader(config, random_params(config))
    np.testing.assert_array_equal(influence(read, "source", L), np.ones((L, L)))
    np.testing.assert_array_equal(influence(read, "inputs", L, {"source": OTHER}), FUTURE & near(2))


def test_an_encoder_has_buckets_for_both_sides_and_a_decoder_for_what_was_before(random_params):
    """Of 8 rows an encoder has 4 for each side, distance 0 among those of the past. A decoder's rows begin at 0, 1, 2,
    3, 4, 4 sqrt 2, 8 ..., of which 8 tokens reach six."""
    config = dataclasses.replace(BASE, n_layers=1, position="relative", relative_buckets=8, relative_distance=16)
    for family, used in (("decoder", {0, 1, 2, 3, 4, 5}), ("encoder", {0, 1, 2, 3, 5, 6, 7})):
        model = Transformer(dataclasses.replace(config, family=family))
        params = random_params(model.config)

        def squares(table, p=params, m=model, family=family):
            stack = p[family] | {"relative": {"table": table}}
            return (logits(m, p | {family: stack}, {"inputs": TOKENS[None]}) ** 2).sum()

        rows = jax.jit(jax.grad(squares))(params[family]["relative"]["table"])
        assert {i for i, row in enumerate(np.asarray(rows)) if np.abs(row).max() > 1e-6} == used


# Texts of 3, 2 and 3 tokens in one row, and padding.
ROW = np.array([[1, 1, 1, 2, 2, 3, 3, 3, 0]], np.int32)
AT = np.array([[0, 1, 2, 0, 1, 0, 1, 2, 0]], np.int32)
FIRST, LAST = slice(0, 3), slice(5, 8)
ENCODER = {"family": "encoder", "n_layers": 1}
PAIRS = {"family": "encoder_decoder", "n_layers": 1}
PACKED: dict[str, dict[str, Any]] = {
    "rotary": {"window": 2, "global_every": 2},
    "learned": {"position": "learned", "n_experts": 3, "experts_per_token": 2},
    "alibi": {"position": "alibi"},
    "relative": {"position": "relative", "relative_buckets": 4, "relative_distance": 6},
    "sinusoidal latent": {"position": "sinusoidal", "n_kv_heads": 4, "kv_rank": 5, "d_rope": 2},
    "encoder, rotary": {**ENCODER},
    "encoder, relative": {**ENCODER, "position": "relative", "relative_buckets": 8, "relative_distance": 6},
    "encoder, learned": {**ENCODER, "position": "learned", "norm_placement": "post", "norm": "layer"},
    "translator, rotary": {**PAIRS},
    "translator, relative": {**PAIRS, "position": "relative", "relative_buckets": 8, "relative_distance": 6},
    "translator, sinusoidal": {**PAIRS, "position": "sinusoidal", "norm_placement": "post"},
}


@pytest.mark.parametrize("name", PACKED)
def test_a_packed_text_reads_as_it_does_alone_whatever_stands_beside_it(name, random_params):
    """Its pair, packed in another order of lengths, included; so padding and other texts change nothing."""
    config = dataclasses.replace(BASE, **PACKED[name])
    read = reader(config, random_params(config))
    text, beside = RNG.integers(0, 13, (2, 9)), RNG.integers(0, 13, (2, 9))
    apart = {"inputs": np.stack([text[0, FIRST], text[0, LAST]])}
    row = {"inputs": text[:1], "segments": ROW, "positions": AT}
    mine = {"inputs": (ROW == 1) | (ROW == 3)}
    if config.family == "encoder_decoder":  # sources of 2, 4 and 2 tokens, and padding
        ids, at = np.array([[1, 1, 2, 2, 2, 2, 3, 3, 0]]), np.array([[0, 1, 0, 1, 2, 3, 0, 1, 0]])
        row |= {"source": text[1:], "source_segments": ids, "source_positions": at}
        apart["source"] = np.stack([text[1, 0:2], text[1, 6:8]])
        mine["source"] = (ids == 1) | (ids == 3)
    row, apart = ({k: jnp.asarray(v, jnp.int32) for k, v in batch.items()} for batch in (row, apart))
    got = read(row)[0]
    np.testing.assert_allclose(np.stack([got[FIRST], got[LAST]]), read(apart), rtol=1e-4, atol=1e-4)
    changed = {k: jnp.where(mine[k], row[k], jnp.asarray(beside[i : i + 1], jnp.int32)) for i, k in enumerate(mine)}
    assert all((changed[k] != row[k]).any() for k in mine)
    again = read(row | changed)[0]
    for part in (FIRST, LAST):
        np.testing.assert_allclose(again[part], got[part], rtol=1e-5, atol=1e-6)


def test_a_sources_padding_is_not_read_though_the_target_is_one_text(random_params):
    config = dataclasses.replace(BASE, **PAIRS)
    read = reader(config, random_params(config))
    source, target = (jnp.asarray(RNG.integers(0, 13, (1, n)), jnp.int32) for n in (5, 4))
    padded = jnp.pad(source, [(0, 0), (0, 3)], constant_values=7)
    ids = jnp.asarray([[1] * 5 + [0] * 3], jnp.int32)
    got = read({"inputs": target, "source": padded, "source_segments": ids})
    np.testing.assert_allclose(got, read({"inputs": target, "source": source}), rtol=1e-4, atol=1e-4)
