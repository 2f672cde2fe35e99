"""What a model's attention makes of its input: the maps in and out, rotation, norms of heads, scale; by hand and by
formulas in numpy."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.attention import Context, attend, attention, attention_params, dot
from transformer.config import ModelConfig
from transformer.masks import Causal, Everything, Mask, Window
from transformer.placement import UNSHARDED
from transformer.positions import Alibi, rotary_frequencies, rotate

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def model(**changes: Any) -> ModelConfig:
    shape = {"d_model": 15, "n_heads": 6, "n_kv_heads": 3, "d_head": 4, "d_ff": 8, "vocab_size": 16, "max_len": 8}
    return ModelConfig(n_layers=1, **shape | changes)


def weights(config: ModelConfig, *, cross: bool = False) -> dict[str, jax.Array]:
    table = attention_params(config, cross=cross)
    return {n: 0.4 * random(*p.shape, seed=i) + 1.0 * n.endswith("scale") for i, (n, p) in enumerate(table.items())}


def run(config: ModelConfig, params: Any, x: jax.Array, mask: Mask, memory: jax.Array | None = None) -> jax.Array:
    bias = Alibi(config.n_kv_heads, config.n_heads // config.n_kv_heads) if config.position == "alibi" else None
    context = Context(jnp.arange(x.shape[1])[None], memory=memory, bias=bias)
    return jax.jit(
        lambda params, x: attention(
            params, x, mask, context,
            kind=config.kind(0), cross=memory is not None, config=config, attend=attend, shard=UNSHARDED,
        )
    )(params, x)  # fmt: skip


def formula(q, k, v, seen) -> np.ndarray:
    """Equation 1 of Vaswani et al. 2017, with the keys of every query listed."""
    scores = np.exp(np.einsum("blkgh,bskh->bkgls", q, k) * q.shape[-1] ** -0.5) * seen
    return np.einsum("bkgls,bskv->blkgv", scores / scores.sum(-1, keepdims=True), v)


def handed_over(config: ModelConfig, *, cross: bool = False) -> dict[str, Any]:
    """What the attention of a model hands to the function that attends."""
    found: dict[str, Any] = {}
    memory = random(2, 7, 15, seed=1) if cross else None
    context = Context(jnp.arange(5)[None], memory=memory, bias=Alibi(config.n_kv_heads, 2))

    def spy(q, k, v, mask, **pieces):
        found.update(q=q, k=k, v=v, **pieces)
        return attend(q, k, v, mask, **pieces)

    def call(params: Any, x: jax.Array) -> tuple[jax.Array, ...]:
        attention(
            params, x, Everything(), context,
            kind=config.kind(0), cross=cross, config=config, attend=spy, shard=UNSHARDED,
        )  # fmt: skip
        return found["q"], found["k"], found["v"]

    q, k, v = jax.jit(call)(weights(config, cross=cross), random(2, 5, 15))
    return found | {"q": q, "k": k, "v": v}


def test_queries_that_are_keys_by_hand():
    """Token 0 is asked as 0 and token 1 as (2^1/4, 0): scores of query 1 are 0 and sqrt 2 / sqrt H = 1."""
    config = model(d_model=3, n_heads=5, n_kv_heads=5, d_head=2, d_value=7, share="query_key", position="none")
    params = weights(config)
    assert set(params) == {"w_q", "w_v", "w_o"}
    params["w_q"] = jnp.zeros((3, 5, 1, 2)).at[1, :, :, 0].set(2**0.25)
    got = run(config, params, jnp.eye(2, 3)[None], Causal())[0]
    v = np.asarray(params["w_v"])[:2]
    want = [np.tensordot(heads, params["w_o"][:, 0], 2) for heads in (v[0], (v[0] + math.e * v[1]) / (1 + math.e))]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_values_that_are_keys_by_hand():
    """Keys and values are (0, 5) and (1, 7), token 1 asks with (sqrt 2, 0): scores 0 and sqrt 2 / sqrt H = 1."""
    config = model(d_model=5, n_heads=6, n_kv_heads=3, d_head=2, share="key_value", position="none")
    params = weights(config)
    assert set(params) == {"w_q", "w_v", "w_o"}
    params["w_q"] = jnp.zeros((5, 3, 2, 2)).at[1, :, :, 0].set(2**0.5)
    params["w_v"] = jnp.zeros((5, 3, 2)).at[0].set(jnp.asarray([0.0, 5.0])).at[1].set(jnp.asarray([1.0, 7.0]))
    got = run(config, params, jnp.eye(2, 5)[None], Causal())[0]
    read = np.array([[0, 5], np.array([math.e, 5 + 7 * math.e]) / (1 + math.e)])
    np.testing.assert_allclose(got, read @ np.asarray(params["w_o"]).sum((0, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 0.5),
        ({"score": "dot"}, 1.0),
        ({"score": "additive"}, 1.0),
        ({"score": "cosine"}, 1.0),
        ({"score_scale": 0.3}, 0.3),
        ({"score": "dot", "score_scale": 0.3}, 0.3),
        ({"rope_scaling": "yarn", "rope_factor": math.e**10, "rope_trained_len": 8}, 0.5 * 4),  # (0.1 ln e^10 + 1)^2
    ],
)
def test_scores_are_scaled_by_the_kind_of_score(changes, scale):
    found = handed_over(model(**changes))
    assert found["scale"] == pytest.approx(scale)
    assert (found["score"] is dot) == (changes.get("score") != "additive")


def test_what_a_model_asks_for_is_handed_over():
    plain, full = handed_over(model(position="alibi")), handed_over(model(sinks=True, score_cap=7.0))
    assert (plain["cap"], plain["sinks"], full["cap"], full["sinks"].shape) == (None, None, 7.0, (3, 2))
    assert isinstance(plain["bias"], Alibi)
    assert handed_over(model(position="alibi"), cross=True)["bias"] is None  # places of two texts have no distance
    cosines = handed_over(model(score="cosine", position="none"))
    temperatures = np.minimum(np.exp(weights(model(score="cosine"))["log_temperature"]), 100)
    lengths = np.broadcast_to(temperatures, (2, 5, 3, 2))
    np.testing.assert_allclose(jnp.linalg.norm(cosines["q"], axis=-1), lengths, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(cosines["k"], axis=-1), 1, rtol=1e-5)


@pytest.mark.parametrize("qk_norm", [False, True], ids=["", "normed"])
def test_attention_equals_its_parts(qk_norm):
    """Three maps with biases, norms of heads, rotation, a window, and the map back, in loops."""
    config = model(bias=True, qk_norm=qk_norm)
    params, x = weights(config), random(2, 5, 15)
    q, k, v = (
        np.tensordot(x, params[f"w_{n}"], axes=1) + np.asarray(params[f"b_{n}"]) for n in ("q", "k", "v")
    )  # fmt: skip
    if qk_norm:
        q, k = (
            t / np.sqrt((t**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(params[f"{n}_scale"])
            for t, n in ((q, "q"), (k, "k"))
        )
    frequencies = rotary_frequencies(config, config.kind(0))
    q, k = (np.asarray(rotate(jnp.asarray(t), jnp.arange(5)[None], frequencies)) for t in (q, k))
    seen = np.tril(np.ones((5, 5))) * np.triu(np.ones((5, 5)), -2)
    want = np.tensordot(formula(q, k, v, seen), params["w_o"], axes=3) + np.asarray(params["b_o"])
    np.testing.assert_allclose(run(config, params, x, Causal() & Window(3)), want, rtol=1e-4, atol=1e-4)


def test_cross_attention_asks_of_one_text_and_reads_another():
    """Nothing is rotated: places in two texts have nothing to do with each other."""
    for share in ("none", "query_key"):
        config = model(n_kv_heads=6, share=share, qkv_bias=True)
        params, x, memory = weights(config, cross=True), random(2, 5, 15), random(2, 7, 15, seed=1)
        q = np.tensordot(x, params["w_q"], axes=1) + np.asarray(params["b_q"])
        names = ("w_k", "b_k") if share == "none" else ("w_q", "b_q")
        k, v = (
            np.tensordot(memory, params[w], axes=1) + np.asarray(params[b]) for w, b in (names, ("w_v", "b_v"))
        )  # fmt: skip
        heads = formula(q, k.reshape(2, 7, 6, 4), v, np.ones((5, 7)))
        want = np.tensordot(heads, params["w_o"], axes=3)
        np.testing.assert_allclose(run(config, params, x, Everything(), memory), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("q_rank", [None, 7])
def test_latent_attention_is_the_equations_of_deepseek_v2(q_rank):
    """DeepSeek-V2, eqs. 9 to 19, head by head: keys and values from a latent, and one key that rotates for all."""
    config = model(n_kv_heads=6, d_head=5, kv_rank=11, q_rank=q_rank, d_rope=2, d_value=3)
    p, x = {name: np.asarray(w) for name, w in weights(config).items()}, random(2, 5, 15)

    def normed(t, scale):
        return t / np.sqrt((t**2).mean(-1, keepdims=True) + 1e-5) * scale

    def turned(t):
        return np.asarray(rotate(jnp.asarray(t), jnp.arange(5)[None], np.ones(1)))

    latent = normed(np.asarray(x) @ p["w_kv_down"], p["kv_scale"])
    asked = x if q_rank is None else normed(np.asarray(x) @ p["w_q_down"], p["latent_q_scale"])
    shared = turned(np.asarray(x) @ p["w_k_rope"])
    out = np.zeros((2, 5, 15))
    for n in range(6):
        q = np.asarray(asked) @ p["w_q" if q_rank is None else "w_q_up"][:, n]
        q = np.concatenate([q[..., :3], turned(q[..., 3:])], axis=-1)
        k = np.concatenate([latent @ p["w_k_up"][:, n], shared], axis=-1)
        v = latent @ p["w_v_up"][:, n]
        heads = formula(q[:, :, None, None], k[:, :, None], v[:, :, None], np.tril(np.ones((5, 5))))
        out += heads[:, :, 0, 0] @ p["w_o"][n, 0]
    np.testing.assert_allclose(run(config, weights(config), x, Causal()), out, rtol=1e-4, atol=1e-4)


def test_groups_that_share_a_key_head_are_heads_with_equal_keys():
    """A model of 6 heads on 3 key heads is one of 6 on 6 whose maps to keys and values are repeated."""
    grouped = model(position="alibi", sinks=True, qkv_bias=True, score="additive")
    params = weights(grouped)
    many = {}
    for name, w in params.items():
        if name in ("w_q", "b_q", "w_o", "sinks", "w_score"):
            at = 1 if name == "w_q" else 0
            many[name] = w.reshape(*w.shape[:at], 6, *([] if name == "sinks" else [1]), *w.shape[at + 2 :])
        else:
            many[name] = jnp.repeat(w, 2, axis=0 if name.startswith("b") else 1)
    many["sinks"] = many["sinks"].reshape(6, 1)
    heads = dataclasses.replace(grouped, n_kv_heads=6)
    assert {name: w.shape for name, w in many.items()} == {n: p.shape for n, p in attention_params(heads).items()}
    x = random(2, 5, 15)
    np.testing.assert_allclose(run(heads, many, x, Causal()), run(grouped, params, x, Causal()), rtol=1e-4, atol=1e-4)
