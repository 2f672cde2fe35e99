"""Attention by hand, and its properties."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from transformer.attention import additive, attend, cosine, dot
from transformer.masks import Causal, Everything, Mask, Window
from transformer.positions import Alibi, Bias

pytestmark = pytest.mark.usefixtures("strict_dtypes")

B, L, K, G, H, V, S = 3, 5, 7, 11, 13, 17, 2  # every dim another prime, so that no transposition passes
shapes = st.sampled_from([(1, 2, 1, 1, 2), (2, 6, 3, 2, 4), (1, 5, 1, 3, 2)])  # batch, length, kv, group, head
seeds = st.integers(0, 99)
few = settings(max_examples=12, deadline=None, derandomize=True)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Given(Mask):
    """A mask that is listed."""

    seen: np.ndarray

    def __call__(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        return jnp.asarray(self.seen)[:, queries][:, :, keys]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Second(Bias):
    """1 for the second key."""

    def __call__(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        return jnp.broadcast_to((keys == 1).astype(jnp.float32)[None, None, None], (K, G, len(queries), len(keys)))


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def qkv(batch: int, length: int, kv: int, group: int, head: int, seed: int) -> tuple[jax.Array, ...]:
    return (
        random(batch, length, kv, group, head, seed=seed),
        random(batch, length, kv, head, seed=seed + 1),
        random(batch, length, kv, head, seed=seed + 2),
    )


@jax.jit
def scaled(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    return attend(q, k, v, mask, scale=q.shape[-1] ** -0.5)


def loops(q, k, v, mask, scale=None, bias=lambda n, g, i, s: 0.0) -> np.ndarray:
    """Equation 1 of Vaswani et al. 2017, one query and one number at a time."""
    out = np.zeros((*q.shape[:4], v.shape[-1]))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    for b, i, n, g in np.ndindex(q.shape[:4]):
        seen = [s for s in range(k.shape[1]) if mask[b, i, s]]
        scores = [float(np.dot(q[b, i, n, g], k[b, s, n])) * scale + bias(n, g, i, s) for s in seen]
        total = sum(math.exp(score) for score in scores)
        for s, score in zip(seen, scores, strict=True):
            out[b, i, n, g] += math.exp(score) / total * np.asarray(v[b, s, n])
    return out


def along(i: int, *values: float) -> np.ndarray:
    """Vectors of zeros but for number i, one for each value."""
    return np.stack([np.eye(H)[i] * value for value in values])


def two_keys(q: np.ndarray, k: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """The same query everywhere, and the same two keys."""
    return (
        jnp.asarray(np.broadcast_to(q, (B, L, K, G, H)), jnp.float32),
        jnp.asarray(np.broadcast_to(k[:, None], (B, S, K, H)), jnp.float32),
    )


def cosines() -> tuple[jax.Array, jax.Array]:
    """Right angle and 60 degrees, t = 2: scores 0 and 1, whatever the lengths."""
    q, k = two_keys(along(4, 3.0), along(5, 7.0, 5 * math.sqrt(3)) + along(4, 0.0, 5.0))
    return cosine(q, k, jnp.full((K, G), math.log(2)))


TWO_KEYS: dict[str, tuple[tuple[jax.Array, jax.Array], dict[str, Any]]] = {  # scores 0 and 1, by hand
    "scaled dot": (two_keys(along(4, math.sqrt(H)), along(4, 0.0, 1.0)), {"scale": H**-0.5}),
    "dot": (two_keys(along(4, 0.5), along(4, 0.0, 2.0)), {"scale": 1.0}),
    "additive": (
        two_keys(along(4, 0.5), along(4, -0.5, 0.5)),
        {"scale": 1.0, "score": additive(jnp.zeros((K, G, H)).at[..., 4].set(1 / math.tanh(1)))},
    ),
    "cosine": (cosines(), {"scale": 1.0}),
    "soft cap": (two_keys(along(4, 1.0), along(4, 0.0, 2 * math.atanh(0.5))), {"scale": 1.0, "cap": 2.0}),
    "bias": (two_keys(along(4, 0.0), along(4, 3.0, 5.0)), {"scale": 1.0, "bias": Second()}),
    "bias after the cap": (
        two_keys(along(4, 1.0), along(4, 2 * math.atanh(0.5), 2 * math.atanh(0.5))),
        {"scale": 1.0, "cap": 2.0, "bias": Second()},
    ),
}


@pytest.mark.smoke
@pytest.mark.parametrize(("qk", "pieces"), TWO_KEYS.values(), ids=TWO_KEYS)
def test_two_keys_weigh_1_and_e(qk, pieces):
    v = random(B, S, K, V)
    got = jax.jit(partial(attend, **pieces))(*qk, v, Everything())
    want = (v[:, 0] + math.e * v[:, 1]) / (1 + math.e)
    np.testing.assert_allclose(got, np.broadcast_to(want[:, None, :, None], got.shape), rtol=1e-5, atol=1e-6)


def test_a_sink_takes_weight_and_gives_nothing():
    """Scores 0 and 1 beside a sink of ln n: weights 1 / (1 + e + n), e / (1 + e + n), for each head its n."""
    (q, k), v = TWO_KEYS["dot"][0], random(B, S, K, V)
    n = jnp.arange(1.0, K * G + 1).reshape(K, G)
    read = jax.jit(partial(attend, scale=1.0, sinks=jnp.log(n)))
    got = read(q, k, v, Everything())
    want = (v[:, 0] + math.e * v[:, 1])[:, None, :, None] / (1 + math.e + np.asarray(n)[None, None, :, :, None])
    np.testing.assert_allclose(got, np.broadcast_to(want, got.shape), rtol=1e-5, atol=1e-6)
    blind = read(q, k, v, Given(np.zeros((B, L, S), bool)))
    np.testing.assert_array_equal(blind, jnp.zeros_like(blind))  # all weight is the sink's


def test_alibi_by_hand():
    """8 heads in 2 groups of 4, equal scores: query 1 gives the key behind it e^-slope, slopes 1/2 ... 1/256."""
    q, k, v = jnp.zeros((1, 2, 2, 4, 3)), random(1, 2, 2, 3), random(1, 2, 2, 5)
    got = jax.jit(partial(attend, scale=1.0, bias=Alibi(2, 4)))(q, k, v, Causal())
    v = np.asarray(v)
    for n, g in np.ndindex(2, 4):
        behind = math.exp(-(0.5 ** (4 * n + g + 1)))
        want = (behind * v[0, 0, n] + v[0, 1, n]) / (behind + 1)
        np.testing.assert_allclose(got[0, 1, n, g], want, rtol=1e-6, atol=1e-6)


def test_a_learned_temperature_ends_at_100():
    """Liu et al. 2022: cosines are multiplied by at most 100."""
    q, k = two_keys(along(4, 3.0), along(4, 2.0, -1.0))
    hot, at_most = (
        dot(*cosine(q, k, jnp.full((K, G), math.log(t)))) for t in (1e4, 100.0)
    )  # fmt: skip
    np.testing.assert_array_equal(hot, at_most)
    np.testing.assert_allclose(hot[0, 0, 0, 0], [100, -100], rtol=1e-5)
    half = cosine(q.astype(jnp.bfloat16), k.astype(jnp.bfloat16), jnp.zeros((K, G), jnp.bfloat16))
    np.testing.assert_allclose(dot(*half)[0, 0, 0, 0], [1, -1], rtol=1e-5)


def test_equals_the_formula_in_loops():
    q, k, v = random(2, 3, 5, 7, 11), random(2, 13, 5, 11), random(2, 13, 5, 4)
    mask = np.random.default_rng(0).random((2, 3, 13)) < 0.6
    np.testing.assert_allclose(scaled(q, k, v, Given(mask)), loops(q, k, v, mask), rtol=1e-5, atol=1e-6)


@few
@given(shapes, seeds, st.sampled_from([None, 1, 3]), st.data())
def test_later_token_changes_no_earlier_output(shape, seed, window, data):
    tensors = [np.array(x) for x in qkv(*shape, seed=seed)]
    mask = Causal() & Window(window) if window else Causal()
    at = data.draw(st.integers(1, shape[1] - 1))
    before = np.asarray(scaled(*map(jnp.asarray, tensors), mask))
    for x in tensors:
        x[:, at:] += 1 + np.arange(x[:, at:].size).reshape(x[:, at:].shape) % 3
    after = np.asarray(scaled(*map(jnp.asarray, tensors), mask))
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
    before = scaled(*map(jnp.asarray, (q, k, v)), Given(mask))
    left = [s for s in range(length) if s != gone]  # as if it were not there
    np.testing.assert_allclose(before, loops(q, k[:, left], v[:, left], mask[:, :, left]), rtol=1e-4, atol=1e-5)
    k[:, gone], v[:, gone] = 9, 9
    np.testing.assert_array_equal(before, scaled(*map(jnp.asarray, (q, k, v)), Given(mask)))


@pytest.mark.parametrize(("kv", "group"), [(7, 1), (1, 7), (3, 5)], ids=["multi-head", "multi-query", "grouped"])
def test_grouped_equals_repeated_heads(kv, group):
    q, k, v = qkv(2, 5, kv, group, 11, seed=0)
    heads = q.reshape(2, 5, kv * group, 1, 11)
    repeated = scaled(heads, jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2), Causal())
    np.testing.assert_allclose(scaled(q, k, v, Causal()), repeated.reshape(q.shape), rtol=1e-5, atol=1e-6)


def test_query_that_sees_no_key_returns_the_mean_of_v():
    q, k, v = qkv(2, 5, 3, 2, 7, seed=0)
    got = scaled(q, k, v, Given(np.zeros((2, 5, 5), bool)))
    want = np.broadcast_to(v.mean(1)[:, None, :, None], got.shape)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_no_gradient_is_nan_where_no_key_is_seen():
    q, k, v = qkv(1, 3, 1, 1, 2, seed=0)
    blind = Given(np.zeros((1, 3, 3), bool))
    for pieces in ({}, {"cap": 2.0, "bias": Alibi(1, 1)}, {"sinks": jnp.zeros((1, 1))}):
        read = partial(attend, mask=blind, scale=1.0, **pieces)
        grads = jax.jit(jax.grad(lambda *x, read=read: read(*x).sum(), argnums=(0, 1, 2)))(q, k, v)
        assert all(bool(jnp.isfinite(grad).all()) for grad in grads)


def test_softmax_is_float32_and_the_result_has_the_dtype_of_v():
    """300 equal keys in bf16: weights summed in bf16 (8 bits) would stop growing at 256."""
    ones = jnp.ones((1, 300, 1, 2), jnp.bfloat16)
    got = scaled(ones[:, :1, :, None], ones, ones, Everything())
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), 1, rtol=2**-7)
    assert jax.eval_shape(dot, ones[:, :1, :, None], ones).dtype == jnp.float32


def test_no_product_of_16_bit_attention_runs_in_32_bit():
    """Neither forward nor backward: a float32 operand would halve the rate."""
    x = jnp.ones((1, 4, 1, 2), jnp.bfloat16)
    traced = jax.make_jaxpr(jax.grad(lambda q, k: attend(q[:, :, :, None], k, k, Causal(), scale=1.0).sum(), (0, 1)))
    products = list(_products(traced(x, x).jaxpr))
    assert len(products) == 6
    assert {operand.aval.dtype for product in products for operand in product.invars} == {jnp.dtype(jnp.bfloat16)}


def _products(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _products(inner)


@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_window_is_a_slice(window):
    q, k, v = qkv(2, 5, 3, 2, 7, seed=0)
    got = scaled(q, k, v, Causal() & Window(window))
    for at in range(5):
        seen = slice(max(0, at - window + 1), at + 1)
        alone = scaled(q[:, at : at + 1], k[:, seen], v[:, seen], Everything())
        np.testing.assert_allclose(got[:, at : at + 1], alone, rtol=1e-5, atol=1e-6)
