"""Attention by hand, and its properties."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer.attention import attend, attend_causal, attention, attention_params, causal_mask, rotate
from transformer.config import preset
from transformer.sharding import UNSHARDED

pytestmark = pytest.mark.usefixtures("strict_dtypes")

B, L, K, G, H, S = 3, 5, 7, 11, 13, 2  # every dim another prime, so that no transposition passes
shapes = st.sampled_from([(1, 2, 1, 1, 2), (2, 6, 3, 2, 4), (1, 5, 1, 3, 2)])  # batch, length, kv, group, head
seeds = st.integers(0, 99)
few = settings(max_examples=12, deadline=None, derandomize=True)


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def qkv(batch: int, length: int, kv: int, group: int, head: int, seed: int) -> tuple[jax.Array, ...]:
    return (
        random(batch, length, kv, group, head, seed=seed),
        random(batch, length, kv, head, seed=seed + 1),
        random(batch, length, kv, head, seed=seed + 2),
    )


def loops(q, k, v, mask) -> np.ndarray:
    """Equation 1 of Vaswani et al. 2017, one query and one number at a time."""
    out = np.zeros(q.shape)
    for b, i, n, g in np.ndindex(q.shape[:4]):
        seen = [s for s in range(k.shape[1]) if mask[b, i, s]]
        scores = [float(np.dot(q[b, i, n, g], k[b, s, n])) / math.sqrt(q.shape[-1]) for s in seen]
        total = sum(math.exp(score) for score in scores)
        for s, score in zip(seen, scores, strict=True):
            out[b, i, n, g] += math.exp(score) / total * np.asarray(v[b, s, n])
    return out


@pytest.mark.smoke
def test_two_keys_weigh_1_and_e():
    q = jnp.zeros((B, L, K, G, H)).at[..., 4].set(math.sqrt(H))
    k = jnp.zeros((B, S, K, H)).at[:, 1, :, 4].set(1)  # scores 0 and 1
    v = random(B, S, K, H)
    got = attend(q, k, v, jnp.ones((B, L, S), bool))
    want = (v[:, 0] + math.e * v[:, 1]) / (1 + math.e)
    np.testing.assert_allclose(got, np.broadcast_to(want[:, None, :, None], got.shape), rtol=1e-6, atol=1e-6)


def test_equals_the_formula_in_loops():
    q, k, v = random(2, 3, 5, 7, 11), random(2, 13, 5, 11), random(2, 13, 5, 11, seed=1)
    mask = np.random.default_rng(0).random((2, 3, 13)) < 0.6
    np.testing.assert_allclose(attend(q, k, v, jnp.asarray(mask)), loops(q, k, v, mask), rtol=1e-5, atol=1e-6)


@few
@given(shapes, seeds, st.sampled_from([None, 1, 3]), st.data())
def test_later_token_changes_no_earlier_output(shape, seed, window, data):
    tensors = [np.array(x) for x in qkv(*shape, seed=seed)]
    at = data.draw(st.integers(1, shape[1] - 1))
    before = np.asarray(attend_causal(*map(jnp.asarray, tensors), window=window, backend="xla"))
    for x in tensors:
        x[:, at:] += 1 + np.arange(x[:, at:].size).reshape(x[:, at:].shape) % 3
    after = np.asarray(attend_causal(*map(jnp.asarray, tensors), window=window, backend="xla"))
    np.testing.assert_array_equal(before[:, :at], after[:, :at])
    assert not np.allclose(before[:, at:], after[:, at:])


@few
@given(shapes, seeds, st.data())
def test_masked_key_changes_nothing(shape, seed, data):
    q, k, v = (np.array(x) for x in qkv(*shape, seed=seed))
    length = shape[1]
    gone = data.draw(st.integers(0, length - 1))
    mask = np.ones((shape[0], length, length), bool)
    mask[:, :, gone] = False
    before = attend(*map(jnp.asarray, (q, k, v, mask)))
    left = [s for s in range(length) if s != gone]  # as if it were not there
    np.testing.assert_allclose(before, loops(q, k[:, left], v[:, left], mask[:, :, left]), rtol=1e-4, atol=1e-5)
    k[:, gone], v[:, gone] = 9, 9
    np.testing.assert_array_equal(before, attend(*map(jnp.asarray, (q, k, v, mask))))


@pytest.mark.parametrize(("kv", "group"), [(7, 1), (1, 7), (3, 5)], ids=["multi-head", "multi-query", "grouped"])
def test_grouped_equals_repeated_heads(kv, group):
    q, k, v = qkv(2, 5, kv, group, 11, seed=0)
    mask = causal_mask(5)[None]
    heads = q.reshape(2, 5, kv * group, 1, 11)
    repeated = attend(heads, jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2), mask)
    np.testing.assert_allclose(attend(q, k, v, mask), repeated.reshape(q.shape), rtol=1e-5, atol=1e-6)


def test_query_that_sees_no_key_returns_the_mean_of_v():
    q, k, v = qkv(2, 5, 3, 2, 7, seed=0)
    got = attend(q, k, v, jnp.zeros((2, 5, 5), bool))
    want = np.broadcast_to(v.mean(1)[:, None, :, None], got.shape)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_no_gradient_is_nan_where_no_key_is_seen():
    q, k, v = qkv(1, 3, 1, 1, 2, seed=0)
    grads = jax.grad(lambda *x: attend(*x, jnp.zeros((1, 3, 3), bool)).sum(), argnums=(0, 1, 2))(q, k, v)
    assert all(bool(jnp.isfinite(grad).all()) for grad in grads)


def test_softmax_is_float32_and_the_result_has_the_dtype_of_v():
    """300 equal keys in bf16: weights summed in bf16 (8 bits) would stop growing at 256."""
    ones = jnp.ones((1, 300, 1, 2), jnp.bfloat16)
    got = attend(ones[:, :1, :, None], ones, ones, jnp.ones((1, 1, 300), bool))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), 1, rtol=2**-7)
    scores = jax.make_jaxpr(attend)(ones[:, :1, :, None], ones, ones, jnp.ones((1, 1, 300), bool))
    assert next(e.outvars[0].aval.dtype for e in scores.eqns if e.primitive.name == "dot_general") == jnp.float32


@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_window_is_a_slice(window):
    q, k, v = qkv(2, 5, 3, 2, 7, seed=0)
    got = attend_causal(q, k, v, window=window, backend="xla")
    for at in range(5):
        seen = slice(max(0, at - window + 1), at + 1)
        keys, values = k[:, seen], v[:, seen]
        alone = attend(q[:, at : at + 1], keys, values, jnp.ones((1, 1, keys.shape[1]), bool))
        np.testing.assert_allclose(got[:, at : at + 1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.smoke
def test_causal_mask_listed():
    assert causal_mask(4).astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert causal_mask(4, 2).astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert causal_mask(3, 1).astype(int).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_rotation_at_position_0_is_none():
    x = random(2, 1, 3, 5, 14)
    np.testing.assert_array_equal(rotate(x, jnp.zeros((1, 1), jnp.int32), theta=100.0), x)


def test_rotation_turns_each_pair_by_its_angle():
    """H = 4: the pairs (x0, x2), (x1, x3) turn at position 3 by 3 and by 3 / sqrt(theta) = 0.3."""
    x = jnp.asarray([2.0, 3.0, 5.0, 7.0]).reshape(1, 1, 1, 4)
    got = rotate(x, jnp.full((1, 1), 3), theta=100.0).ravel()
    c, s, c1, s1 = math.cos(3), math.sin(3), math.cos(0.3), math.sin(0.3)
    np.testing.assert_allclose(got, [2 * c - 5 * s, 3 * c1 - 7 * s1, 5 * c + 2 * s, 7 * c1 + 3 * s1], rtol=1e-5)


@few
@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 50), st.sampled_from([2, 6]))
def test_rotated_scores_depend_on_distance_only(query, key, shift, head):
    q, k = random(1, 1, 1, head), random(1, 1, 1, head, seed=1)

    def score(query: int, key: int) -> float:
        turned = (rotate(x, jnp.full((1, 1), at), theta=10_000.0) for x, at in ((q, query), (k, key)))
        return float((next(turned) * next(turned)).sum())

    np.testing.assert_allclose(score(query, key), score(query + shift, key + shift), rtol=1e-3, atol=1e-4)


def test_rotation_keeps_norms_and_dtype():
    x = random(2, 5, 3, 7, 14)
    got = rotate(x, jnp.arange(5)[None], theta=10_000.0)
    np.testing.assert_allclose(jnp.linalg.norm(got, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    assert not np.allclose(got[:, 1:], x[:, 1:])
    assert rotate(x.astype(jnp.bfloat16), jnp.arange(5)[None], theta=10_000.0).dtype == jnp.bfloat16


def test_attention_equals_its_parts():
    """Three maps with biases, rotation, a window, and the map back, in loops."""
    model = {"d_model": "15", "n_heads": "6", "n_kv_heads": "3", "d_head": "4", "bias": "true", "window": "3"}
    config = preset("tiny", model)
    params = {name: random(*p.shape, seed=i) for i, (name, p) in enumerate(attention_params(config).items())}
    x = random(2, 5, 15)
    got = attention(params, x, config=config, backend="xla", shard=UNSHARDED)
    q, k, v = (
        np.tensordot(x, params[f"w_{n}"], axes=1) + np.asarray(params[f"b_{n}"]) for n in ("q", "k", "v")
    )  # fmt: skip
    positions = jnp.arange(5)[None]
    q, k = (np.asarray(rotate(jnp.asarray(t), positions, theta=config.rope_theta)) for t in (q, k))
    heads = loops(q, k, v, np.broadcast_to(causal_mask(5, 3), (2, 5, 5)))
    want = np.tensordot(heads, params["w_o"], axes=3) + np.asarray(params["b_o"])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
