"""Norm, feed-forward and the ways in which a layer joins them, by formulas; what a layer may see; dropout."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.attention import Context, attend, attention
from transformer.config import LayerKind, ModelConfig
from transformer.experts import mixture
from transformer.feed_forward import feed_forward, feed_forward_params
from transformer.layers import Layer, cross_mask, layer_params, norm, norm_params, self_mask
from transformer.masks import Causal, Chunked, Everything, Prefix, Segments, Window
from transformer.params import Param
from transformer.placement import UNSHARDED

pytestmark = pytest.mark.usefixtures("strict_dtypes")

PLAIN = LayerKind(local=False, rotates=True, experts=False)
EXPERTS = PLAIN._replace(experts=True)


def model(**changes: Any) -> ModelConfig:
    shape = {"d_model": 14, "n_heads": 6, "n_kv_heads": 3, "d_head": 4, "d_ff": 22, "vocab_size": 13, "max_len": 9}
    return ModelConfig(n_layers=1, **shape | changes)


def weights(table: Any, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    leaf = lambda t: isinstance(t, Param)  # noqa: E731
    return jax.tree.map(lambda p: jnp.asarray(0.4 * rng.normal(size=p.shape), jnp.float32), table, is_leaf=leaf)


def stream(seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(3, 2, (2, 5, 14)), jnp.float32)


@pytest.mark.parametrize("kind", ["rms", "layer", "layer without bias"])
def test_norm_is_its_formula(kind):
    config = model(norm=kind.split()[0], norm_bias="without" not in kind, norm_eps=0.1)
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (2, 5, 14))
    params = {name: rng.normal(size=p.shape) for name, p in norm_params(config).items()}
    assert set(params) == ({"scale", "bias"} if kind == "layer" else {"scale"})
    if kind == "rms":
        want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * params["scale"]
    else:
        centred = x - x.mean(-1, keepdims=True)
        want = centred / np.sqrt(x.var(-1, keepdims=True) + 0.1) * params["scale"] + params.get("bias", 0)
    as32 = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    np.testing.assert_allclose(norm(as32, jnp.asarray(x, jnp.float32), config=config), want, rtol=1e-4, atol=1e-5)
    half = norm(as32, jnp.asarray(x, jnp.bfloat16), config=config)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), want, rtol=0.05, atol=0.05)


def gelu(x: np.ndarray) -> np.ndarray:  # Hendrycks & Gimpel 2016, the tanh form
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


HIDDEN = {
    "swiglu": lambda up, gate: gate / (1 + np.exp(-gate)) * up,
    "geglu": lambda up, gate: gelu(gate) * up,
    "gelu": lambda up, _: gelu(up),
    "gelu_exact": lambda up, _: up / 2 * (1 + np.vectorize(math.erf)(up / math.sqrt(2))),
    "relu": lambda up, _: np.maximum(up, 0),
    "relu2": lambda up, _: np.where(up > 0, up**2, 0),
}


@pytest.mark.parametrize("bias", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("ffn", HIDDEN)
def test_feed_forward_is_its_formula(ffn, bias):
    config = model(ffn=ffn, bias=bias)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 14))
    p = {name: rng.normal(size=param.shape) for name, param in feed_forward_params(config).items()}
    assert ("w_gate" in p) == (ffn in ("swiglu", "geglu"))
    gate = x @ p["w_gate"] + p.get("b_gate", 0) if "w_gate" in p else 0
    want = HIDDEN[ffn](x @ p["w_up"] + p.get("b_up", 0), gate) @ p["w_down"] + p.get("b_down", 0)
    as32 = jax.tree.map(lambda t: jnp.asarray(t, jnp.float32), p)
    got = jax.jit(lambda p, x: feed_forward(p, x, config=config, shard=UNSHARDED))(as32, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def joined(p: Any, x: jax.Array, config: ModelConfig, kind: LayerKind, memory: jax.Array | None) -> jax.Array:
    """A layer from its parts, as its docstring says."""
    context = Context(jnp.arange(5)[None], memory=memory)

    def f(name: str, h: jax.Array) -> jax.Array:
        if name == "ffn":
            return feed_forward(p[name], h, config=config, shard=UNSHARDED)
        if name == "experts":
            return mixture(p[name], h, jnp.ones((2, 5)), config=config, shard=UNSHARDED)[0]
        return attention(
            p[name], h, Causal() if name == "attention" else Everything(), context,
            kind=kind, cross=name == "cross", config=config, attend=attend, shard=UNSHARDED,
        )  # fmt: skip

    def n(name: str, h: jax.Array) -> jax.Array:
        return norm(p[name], h, config=config)

    last = "experts" if kind.experts else "ffn"
    if config.parallel:
        h = n("attention_norm", x)
        return x + f("attention", h) + f(last, n(f"{last}_norm", x) if config.parallel_norms else h)
    for name in ("attention", *(["cross"] if memory is not None else []), last):
        if config.norm_placement == "pre":
            x = x + f(name, n(f"{name}_norm", x))
        elif config.norm_placement == "post":
            x = n(f"{name}_norm", x + f(name, x))
        else:
            x = x + n(f"{name}_after", f(name, n(f"{name}_norm", x)))
    return x


@pytest.mark.parametrize(
    ("changes", "kind", "cross"),
    [
        ({}, PLAIN, False),
        ({"bias": True, "norm": "layer"}, PLAIN, True),
        ({"norm_placement": "post", "norm": "layer"}, PLAIN, True),
        ({"norm_placement": "sandwich"}, PLAIN, True),
        ({"parallel": True}, PLAIN, False),
        ({"parallel": True, "parallel_norms": True}, PLAIN, False),
        ({"n_experts": 3, "norm_placement": "sandwich"}, EXPERTS, False),
        ({"n_experts": 3, "parallel": True, "parallel_norms": True}, EXPERTS, False),
    ],
    ids=str,
)
def test_a_layer_joins_its_parts_as_its_placement_says(changes, kind, cross):
    config = model(**changes)
    p, x = weights(layer_params(config, kind, cross=cross)), stream()
    memory = jnp.asarray(np.random.default_rng(2).normal(size=(2, 7, 14)), jnp.float32) if cross else None
    layer = Layer(config, kind, attend, UNSHARDED, causal=True, cross=cross, train=False)
    context = Context(jnp.arange(5)[None], memory=memory)
    got, load = jax.jit(lambda p, x: layer.apply({"params": p}, x, context))(p, x)
    want = jax.jit(lambda p, x: joined(p, x, config, kind, memory))(p, x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert (load is None) != kind.experts


@pytest.mark.parametrize("changes", [{}, {"bias": True, "norm": "layer"}], ids=["llama", "gpt"])
def test_layer_is_two_residual_steps(changes):
    """Maps back to the stream set to zero, a layer is the identity; one set to zero leaves the other."""
    config = model(**changes)
    params, x = weights(layer_params(config, PLAIN, cross=False)), stream()
    layer = Layer(config, PLAIN, attend, UNSHARDED, causal=True, cross=False, train=False)
    run = jax.jit(lambda p: layer.apply({"params": p}, x, Context(jnp.arange(5)[None]))[0])
    closed = {name: jnp.zeros_like(params["attention"][name]) for name in ("w_o", "b_o") if name in params["attention"]}
    alone = params | {"attention": params["attention"] | closed}
    h = norm(params["ffn_norm"], x, config=config)
    want = x + feed_forward(params["ffn"], h, config=config, shard=UNSHARDED)
    np.testing.assert_allclose(run(alone), want, rtol=1e-5, atol=1e-5)
    closed = {name: jnp.zeros_like(params["ffn"][name]) for name in ("w_down", "b_down") if name in params["ffn"]}
    np.testing.assert_array_equal(run(alone | {"ffn": params["ffn"] | closed}), x)


IDS = jnp.asarray([[1, 1, 2, 2, 0]])
LENGTHS = jnp.asarray([3])
LOCAL = PLAIN._replace(local=True)
HOW = {"causal": True, "cross": False, "train": False}
BARE = Context(jnp.arange(5)[None])


@pytest.mark.parametrize(
    ("changes", "kind", "context", "causal", "want"),
    [
        ({}, PLAIN, BARE, True, Causal()),
        ({}, PLAIN, BARE, False, Everything()),
        ({"window": 3}, LOCAL, BARE, True, Causal() & Window(3)),
        ({"window": 3}, PLAIN, BARE, True, Causal()),  # a global layer among local ones
        ({"window": 3}, LOCAL, BARE, False, Window(3)),
        ({"chunk": 4}, LOCAL, BARE, True, Causal() & Chunked(4)),
        ({}, PLAIN, BARE._replace(prefix=LENGTHS), True, Causal() | Prefix(LENGTHS)),
        ({"window": 3}, LOCAL, BARE._replace(prefix=LENGTHS), True, (Causal() | Prefix(LENGTHS)) & Window(3)),
        ({}, PLAIN, BARE._replace(segments=IDS), True, Causal() & Segments(IDS, IDS)),
        ({"chunk": 2}, LOCAL, BARE._replace(segments=IDS), False, Chunked(2) & Segments(IDS, IDS)),
    ],
)
def test_what_a_layer_may_see(changes, kind, context, causal, want):
    got = self_mask(model(**changes), kind, context, causal=causal)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert all(a is b for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))


def test_what_cross_attention_may_see():
    memory = jnp.asarray([[1, 2, 2, 0, 0, 0, 0]])
    assert cross_mask(BARE) == Everything()
    unpacked = cross_mask(BARE._replace(memory_segments=memory))  # a text that reads all but the padding
    np.testing.assert_array_equal(unpacked(jnp.arange(5), jnp.arange(7)), np.tile([[1, 1, 1, 0, 0, 0, 0]], (1, 5, 1)))
    got = cross_mask(BARE._replace(segments=IDS, memory_segments=memory))
    assert isinstance(got, Segments)
    assert got.queries is IDS
    assert got.keys is memory


def test_dropout_is_off_unless_asked_for_follows_its_key_and_keeps_the_mean():
    """What a layer adds to the stream, 2,000 times: a fifth of it is 0, the rest 5/4 of what it was."""
    config = model(dropout=0.2, parallel=True)  # one drop a layer, so what it adds is what is dropped
    p, x, context = weights(layer_params(config, PLAIN, cross=False)), stream(), BARE

    def added(train: bool, key: jax.Array) -> jax.Array:
        layer = Layer(config, PLAIN, attend, UNSHARDED, causal=True, cross=False, train=train)
        return layer.apply({"params": p}, x, context, rngs={"dropout": key})[0] - x

    keys = jax.random.split(jax.random.key(0), 2000)
    whole = jax.jit(added, static_argnums=0)(False, keys[0])
    np.testing.assert_array_equal(whole, jax.jit(added, static_argnums=0)(False, keys[1]))
    each = jax.jit(jax.vmap(lambda key: added(True, key)))(keys)
    assert not np.array_equal(each[0], each[1])
    np.testing.assert_allclose(each[0], jax.jit(added, static_argnums=0)(True, keys[0]), rtol=1e-4, atol=1e-5)
    zero = np.isclose(each, 0, atol=1e-6)
    assert zero.mean() == pytest.approx(0.2, abs=0.005)
    np.testing.assert_allclose(
        np.asarray(each)[~zero], np.broadcast_to(whole, each.shape)[~zero] / 0.8, rtol=1e-3, atol=1e-3
    )
    np.testing.assert_allclose(each.mean(0), whole, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_every_part_that_is_added_is_dropped(placement):
    """Nearly all dropped, the stream of a layer of three parts is what it was (after post-norms: normed)."""
    config = model(dropout=0.999999, norm_placement=placement)
    p, x = weights(layer_params(config, PLAIN, cross=True)), stream()
    layer = Layer(config, PLAIN, attend, UNSHARDED, causal=True, cross=True, train=True)
    context = BARE._replace(memory=x)
    got = layer.apply({"params": p}, x, context, rngs={"dropout": jax.random.key(0)})[0]
    if placement == "post":
        for name in ("attention_norm", "cross_norm", "ffn_norm"):
            x = norm(p[name], x, config=dataclasses.replace(config, dropout=0.0))
    np.testing.assert_allclose(got, x, rtol=1e-5, atol=1e-5)


def test_experts_count_no_padding():
    config = model(n_experts=3, experts_per_token=2)
    p, layer = weights(layer_params(config, EXPERTS, cross=False)), Layer(config, EXPERTS, attend, UNSHARDED, **HOW)
    context = BARE._replace(segments=jnp.asarray([[1, 1, 2, 0, 0], [1, 1, 1, 1, 0]]))
    counts = jax.jit(lambda c: layer.apply({"params": p}, stream(), c)[1].counts.sum())
    assert (float(counts(context)), float(counts(BARE))) == ((3 + 4) * 2, 2 * 5 * 2)
