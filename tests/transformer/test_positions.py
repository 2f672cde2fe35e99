"""Rotation, its frequencies, sinusoids and biases by hand, by loops and by what was published."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer.config import LayerKind, ModelConfig
from transformer.positions import (
    Alibi,
    Relative,
    alibi_slopes,
    rotary_frequencies,
    rotate,
    sinusoidal,
    yarn_temperature,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")

few = settings(max_examples=12, deadline=None, derandomize=True)
GLOBAL = LayerKind(local=False, rotates=True, experts=False)
LOCAL = GLOBAL._replace(local=True)


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def model(**changes) -> ModelConfig:
    shape = {"n_layers": 1, "d_model": 8, "n_heads": 2, "n_kv_heads": 1, "d_head": 8, "d_ff": 8}
    return ModelConfig(vocab_size=16, max_len=8, **shape | changes)


def plain(n: int, theta: float = 10_000.0) -> np.ndarray:
    return theta ** (-np.arange(n) / n)


def test_rotation_at_position_0_is_none():
    x = random(2, 1, 3, 5, 14)
    np.testing.assert_array_equal(rotate(x, jnp.zeros((1, 1), jnp.int32), plain(7)), x)


@pytest.mark.smoke
def test_rotation_turns_each_pair_by_its_angle():
    """H = 4: the pairs (x0, x2), (x1, x3) turn at position 3 by 3 and by 3 / sqrt(theta) = 0.3."""
    x = jnp.asarray([2.0, 3.0, 5.0, 7.0]).reshape(1, 1, 1, 4)
    got = rotate(x, jnp.full((1, 1), 3), rotary_frequencies(model(d_head=4, rope_theta=100.0), GLOBAL)).ravel()
    c, s, c1, s1 = math.cos(3), math.sin(3), math.cos(0.3), math.sin(0.3)
    np.testing.assert_allclose(got, [2 * c - 5 * s, 3 * c1 - 7 * s1, 5 * c + 2 * s, 7 * c1 + 3 * s1], rtol=1e-5)


@few
@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 50), st.sampled_from([2, 6]), st.sampled_from([1, 4, 13]))
def test_rotated_scores_depend_on_distance_only(query, key, shift, head, stretch):
    q, k = random(1, 1, 1, head), random(1, 1, 1, head, seed=1)
    frequencies = plain(head // 2) / stretch

    def score(query: int, key: int) -> float:
        turned = (rotate(x, jnp.full((1, 1), at), frequencies) for x, at in ((q, query), (k, key)))
        return float((next(turned) * next(turned)).sum())

    np.testing.assert_allclose(score(query, key), score(query + shift, key + shift), rtol=1e-3, atol=1e-4)


def test_rotation_keeps_norms_and_dtype():
    x = random(2, 5, 3, 7, 14)
    got = rotate(x, jnp.arange(5)[None], plain(7))
    np.testing.assert_allclose(jnp.linalg.norm(got, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    assert not np.allclose(got[:, 1:], x[:, 1:])
    assert rotate(x.astype(jnp.bfloat16), jnp.arange(5)[None], plain(7)).dtype == jnp.bfloat16


def test_every_sequence_may_have_places_of_its_own():
    x = random(2, 3, 5, 6)
    places = jnp.asarray([[0, 1, 2], [7, 0, 4]])
    got = rotate(x, places, plain(3))
    for b, i in np.ndindex(2, 3):
        alone = rotate(x[b : b + 1, i : i + 1], places[b : b + 1, i : i + 1], plain(3))
        np.testing.assert_allclose(got[b, i], alone[0, 0], rtol=1e-6)


def test_partial_rotation_turns_the_first_part_of_a_head_and_leaves_the_rest():
    """A quarter of a head of 16, as in Pythia: frequencies are those of a head of 4."""
    frequencies = rotary_frequencies(model(d_head=16, rope_fraction=0.25), GLOBAL)
    np.testing.assert_allclose(frequencies, [1, 0.01])
    x = random(2, 5, 3, 16)
    got = rotate(x, jnp.arange(5)[None], frequencies)
    np.testing.assert_array_equal(got[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(got[..., :4], rotate(x[..., :4], jnp.arange(5)[None], plain(2)))


def test_linear_scaling_divides_every_frequency():
    got = rotary_frequencies(model(rope_scaling="linear", rope_factor=4.0, rope_theta=81.0), GLOBAL)
    np.testing.assert_allclose(got, np.array([1, 1 / 3, 1 / 9, 1 / 27]) / 4)


def test_llama3_scaling_is_that_of_the_released_code():
    """Llama 3.1: d_head 128, theta 500,000, factor 8 beyond 8,192 positions; one wavelength after another."""
    llama = model(
        d_head=128, rope_theta=500_000.0, rope_scaling="llama3", rope_factor=8.0, rope_trained_len=8192
    )  # fmt: skip
    want = []
    for i in range(64):
        frequency = 500_000.0 ** (-2 * i / 128)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            want.append(frequency)
        elif wavelength > 8192:
            want.append(frequency / 8)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            want.append((1 - smooth) * frequency / 8 + smooth * frequency)
    kept = [w == p for w, p in zip(want, plain(64, 500_000.0), strict=True)]
    assert 0 < sum(kept) < 64 - sum(np.isclose(want, plain(64, 500_000.0) / 8))  # all three kinds are there
    np.testing.assert_allclose(rotary_frequencies(llama, GLOBAL), want, rtol=1e-12)


def test_yarn_scaling_is_that_of_deepseek():
    """DeepSeek-V3: 64 rotate, factor 40 beyond 4,096. 32 turns are made at i = 10.5 and one at 22.5 (of 32), so all
    to 10 stay, all from 23 on are stretched by 40, and those between in part, by thirteenths."""
    deepseek = model(
        n_kv_heads=2, d_head=192, kv_rank=8, d_rope=64, rope_scaling="yarn", rope_factor=40.0, rope_trained_len=4096
    )  # fmt: skip
    for turns, i in ((32, 10.5), (1, 22.5)):
        assert 4096 * 10_000 ** (-i / 32) / (2 * math.pi) == pytest.approx(turns, rel=0.02)
    want = []
    for i in range(32):
        stretched = min(max((i - 10) / 13, 0), 1)
        want.append(10_000 ** (-i / 32) * (1 - stretched + stretched / 40))
    np.testing.assert_allclose(rotary_frequencies(deepseek, GLOBAL), want, rtol=1e-12)
    # softmax's temperature in the released code: mscale^2 with mscale = 0.1 ln 40 + 1 = 1.3689
    assert yarn_temperature(deepseek, GLOBAL) == pytest.approx(1.36889**2, rel=1e-5)
    assert yarn_temperature(dataclasses.replace(deepseek, rope_scaling="linear"), GLOBAL) == 1
    assert yarn_temperature(deepseek, GLOBAL._replace(rotates=False)) == 1
    local = dataclasses.replace(deepseek, window=4, rope_theta_local=1e4)
    assert yarn_temperature(local, GLOBAL._replace(local=True)) == 1
    assert yarn_temperature(local, GLOBAL) == yarn_temperature(deepseek, GLOBAL)


def test_yarn_of_a_short_training_stretches_from_the_first_pair_on():
    """16 positions: the fastest pair makes 2.5 turns, so none makes 32, and i = 0 is the last that stays."""
    got = rotary_frequencies(model(rope_scaling="yarn", rope_factor=2.0, rope_trained_len=16), GLOBAL)
    np.testing.assert_allclose(got, plain(4) * [1, 0.5, 0.5, 0.5])


def test_local_layers_have_their_own_theta_unscaled():
    """Gemma 3: 1e6 and a factor for global layers, 1e4 for local ones."""
    gemma = model(
        window=4, rope_theta=1e6, rope_theta_local=1e4, rope_scaling="linear", rope_factor=8.0
    )  # fmt: skip
    np.testing.assert_allclose(rotary_frequencies(gemma, GLOBAL), plain(4, 1e6) / 8)
    np.testing.assert_allclose(rotary_frequencies(gemma, LOCAL), plain(4))
    alike = dataclasses.replace(gemma, rope_theta_local=None)
    np.testing.assert_allclose(rotary_frequencies(alike, LOCAL), plain(4, 1e6) / 8)


def test_sinusoids_by_hand():
    """D = 4: sin p, cos p, sin(p / 100), cos(p / 100)."""
    got = sinusoidal(jnp.asarray([[0, 1], [2, 50]]), 4)
    want = [[[f(p / c) for c in (1, 100) for f in (math.sin, math.cos)] for p in row] for row in ([0, 1], [2, 50])]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sinusoidal(jnp.asarray([[3]]), 5)[0, 0, 4], math.sin(3 / 10_000 ** (4 / 5)), rtol=1e-5)


def test_alibi_has_the_slopes_of_the_paper():
    """Press et al. 2022, sec. 3: 8 heads 1/2, 1/4 ... 1/256; 16 heads the roots between too. Their code for 12: those
    of 8, then the first four of 16's that are not among them."""
    assert alibi_slopes(8).tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    np.testing.assert_allclose(alibi_slopes(16)[:4], [0.5**0.5, 0.5, 0.5**1.5, 0.25])
    np.testing.assert_allclose(alibi_slopes(12), [*alibi_slopes(8), 0.5**0.5, 0.5**1.5, 0.5**2.5, 0.5**3.5])
    assert alibi_slopes(1).tolist() == [1 / 256]


def test_alibi_falls_with_distance_by_the_slope_of_each_head():
    got = Alibi(3, 2)(jnp.arange(5), jnp.arange(7))
    assert got.shape == (3, 2, 5, 7)
    slopes = alibi_slopes(6)
    for k, g, i, j in np.ndindex(got.shape):
        assert float(got[k, g, i, j]) == pytest.approx(-slopes[2 * k + g] * abs(i - j), rel=1e-6)


def bucket(distance: int, n: int, longest: int, both_sides: bool) -> int:
    """Raffel et al. 2020, sec. 2.1, without a logarithm: the j-th of the growing buckets begins where
    exact (longest / exact)^(j / growing) is reached. `distance`: of the query from a key before it."""
    first = 0
    if both_sides:
        n //= 2
        first, distance = (n if distance < 0 else 0), abs(distance)
    distance = max(distance, 0)
    exact = n // 2
    if distance < exact:
        return first + distance
    growing, j = n - exact, 0
    while j + 1 < growing and distance**growing >= exact**growing * (longest / exact) ** (j + 1) * (1 - 1e-9):
        j += 1
    return first + exact + j


@pytest.mark.parametrize("both_sides", [False, True], ids=["decoder", "encoder"])
@pytest.mark.parametrize(("n", "longest"), [(32, 128), (8, 20), (12, 60)])
def test_relative_buckets_are_those_of_a_loop(n, longest, both_sides):
    table = jnp.asarray(np.arange(n)[:, None, None] * [[[1, -2]]], jnp.float32)
    keys = jnp.asarray([0, 1, 80, 149, 150])
    got = Relative(table, both_sides, longest)(jnp.arange(151), keys)
    want = np.array([[bucket(i - int(j), n, longest, both_sides) for j in keys] for i in range(151)])
    np.testing.assert_array_equal(got[0, 0], want)
    np.testing.assert_array_equal(got[0, 1], -2 * want)
    assert want.max() == n - 1


def test_a_bias_asked_for_a_block_is_a_slice_of_the_whole():
    places, rows, columns = jnp.arange(40), jnp.arange(30, 37), jnp.arange(3, 25)
    ask = jax.jit(lambda bias, queries, keys: bias(queries, keys))
    for bias in (Alibi(2, 3), Relative(random(8, 2, 3), True, 20), Relative(random(8, 2, 3), False, 20)):
        np.testing.assert_array_equal(ask(bias, rows, columns), ask(bias, places, places)[:, :, 30:37, 3:25])
