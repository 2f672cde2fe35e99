"""Models drawn at random from all that a configuration allows: what must hold for every one of them.

Compiling is what these tests cost, so few are drawn, and each is compared with one other way to compute it.
"""

import dataclasses
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, note, settings
from hypothesis import strategies as st

from transformer.config import Block, ModelConfig
from transformer.losses import balance, cross_entropy
from transformer.models import Transformer, apply, init, model_params
from transformer.params import leaves, map_params
from transformer.placement import UNSHARDED
from transformer.sharding import ACTIVATION_RULES, PARAMETER_RULES, spec

B, L, S, VOCAB = 2, 6, 5, 11
no_shrinking = {"deadline": None, "derandomize": True, "phases": (Phase.explicit, Phase.generate)}


def model_of(seed: int) -> ModelConfig:
    """A small valid model: every choice by lot, those that exclude each other in turn."""
    rng = np.random.default_rng(seed)

    def one(*options: Any) -> Any:
        return options[rng.integers(len(options))]

    def maybe(**keys: Any) -> dict[str, Any]:
        return keys if rng.random() < 0.4 else {}

    family = one("decoder", "encoder", "encoder_decoder")
    n_heads, n_kv_heads = one((2, 1), (2, 2), (4, 2))
    attention: dict[str, Any] = {"score": one("scaled_dot", "dot", "additive", "cosine")}
    attention |= maybe(score_cap=3.0) | maybe(sinks=True)
    attention |= one({}, {"window": 3}, {"chunk": 4}, {"window": 2, "global_every": 2})
    if n_heads == n_kv_heads and rng.random() < 0.5:
        attention |= {"kv_rank": 5, "d_rope": 2} | maybe(q_rank=3) | maybe(d_value=3)
    else:
        attention |= (
            one({}, {"share": "key_value"}, {"d_value": 3}) if n_kv_heads < n_heads else one({}, {"share": "query_key"})
        )
        attention |= maybe(qk_norm=True) | maybe(qkv_bias=True)
    positions = one(
        {"rope_theta": 50.0}, {"rope_fraction": 0.5, "rope_scaling": "linear", "rope_factor": 2.0},
        {"rope_scaling": "yarn", "rope_factor": 2.0, "rope_trained_len": 8, "no_rope_every": 2},
        {"position": "learned"}, {"position": "sinusoidal"}, {"position": "alibi"}, {"position": "none"},
        {"position": "relative", "relative_buckets": 8, "relative_distance": 6},
    )  # fmt: skip
    joins = one({}, {"norm_placement": "post"}, {"norm_placement": "sandwich"}, {"parallel": True})
    if joins.get("parallel"):
        joins |= maybe(parallel_norms=True)
        family = one("decoder", "encoder")
    experts: dict[str, Any] = {}
    if rng.random() < 0.5:
        experts = {"n_experts": 4, "moe_every": one(1, 2), "router": one("softmax", "sigmoid")}
        experts |= one({"experts_per_token": 2}, {"router_normalize": False, "router_scale": 2.0})
        experts |= (
            maybe(n_shared_experts=1) | maybe(capacity_factor=1.0) | maybe(balance_rate=0.1) | maybe(n_dense_layers=1)
        )
        experts |= maybe(router_groups=2, router_top_groups=1) | maybe(d_expert=7)
    rest = {"norm": one("rms", "layer"), "ffn": one("swiglu", "geglu", "gelu", "gelu_exact", "relu", "relu2")}
    for keys in (
        {"norm_bias": False}, {"tied": True}, {"embed_scale": True}, {"embed_norm": True},
        {"token_types": 2}, {"head_bias": True}, {"head_transform": True}, {"logit_scale": 0.7}, {"logit_cap": 4.0},
        {"label_smoothing": 0.1}, {"z_loss": 0.01},
    ):  # fmt: skip
        rest |= maybe(**keys)
    if family == "decoder":
        rest |= maybe(prefix=True)
    if "kv_rank" not in attention and not experts:
        rest |= maybe(bias=True)
    return ModelConfig(
        family=family, n_layers=2, d_model=8, n_heads=n_heads, n_kv_heads=n_kv_heads, d_head=4, d_ff=10,
        vocab_size=VOCAB, max_len=L, vocab_multiple=4, **attention, **positions, **joins, **experts, **rest,
    )  # fmt: skip


models = st.integers(0, 10**6).map(model_of)


def batch_of(config: ModelConfig) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    batch = {
        "inputs": rng.integers(0, VOCAB, (B, L)), "targets": rng.integers(0, VOCAB, (B, L)),
        "segments": [[1, 1, 1, 2, 2, 0], [1] * L], "prefix": [2, 3],
        "source": rng.integers(0, VOCAB, (B, S)), "source_segments": [[1, 1, 2, 2, 2], [1, 1, 1, 1, 0]],
    }  # fmt: skip
    if config.token_types:
        batch["types"] = rng.integers(0, 2, (B, L))
    return {name: jnp.asarray(array, jnp.int32) for name, array in batch.items()}


def differentiated(config: ModelConfig, params: Any, **how: Any) -> tuple[Any, Any]:
    """Loss and its gradient."""
    batch = batch_of(config)

    def loss(params: Any, key: Any) -> jax.Array:
        out = apply(Transformer(config, **how), params, batch, key)
        weights = jnp.ones((B, L)).at[0, -1].set(0)
        entropy = cross_entropy(out.x, out.head, batch["targets"], weights, config=config, shard=UNSHARDED)
        return entropy / 11 + 0.1 * balance(out.loads)

    return jax.device_get(jax.jit(jax.value_and_grad(loss))(params, jax.random.key(0)))


def paths(tree: Any) -> dict[str, Any]:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


@settings(max_examples=12, **no_shrinking)
@given(models)
def test_the_table_is_what_init_returns_and_every_dim_has_one_place(config):
    fresh = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    table = dict(leaves(model_params(config)))
    assert {path: leaf.shape for path, leaf in paths(fresh).items()} == {path: p.shape for path, p in table.items()}
    for param in table.values():
        for rules in (PARAMETER_RULES, ACTIVATION_RULES):
            assert len(spec(param.dims, rules)) == len(param.shape)


WITHOUT_GRADIENT = {
    "b_router": "moves by the loads alone",
    "b_k": "a softmax does not see what is added to all of its scores; with rotation it does",
}


DRAWN = 1
"""Models for each comparison. A hundred in all, drawn once, took ten minutes and found nothing."""

FIRST = {"loop": 233, "dots": 533, "full": 385}
"""The first: a decoder with experts, a latent encoder, a translator. What more are drawn are any."""


def close(got: Any, want: Any) -> None:
    """Every gradient within a ten-thousandth of its own largest entry, or of what is rounding beside the largest."""
    floor = 1e-5 * max(np.abs(g).max() for g in jax.tree.leaves(want))
    for path, g in paths(want).items():
        np.testing.assert_allclose(paths(got)[path], g, rtol=0, atol=max(1e-4 * np.abs(g).max(), floor), err_msg=path)


def as_compared(way: str, config: ModelConfig, params: Any, grads: Any) -> tuple[Any, Any, Any]:
    """Loss and gradient computed in another way, and the gradient known so far in that way's order."""
    if way != "loop":
        return *differentiated(config, params, remat=way, train=True), grads
    single = tuple(Block(i, 1, (config.kind(i),)) for i in range(config.n_layers))
    stacks = [name for name in ("encoder", "decoder") if name in params]
    apart, want = (t | {name: unstacked(config, t[name]) for name in stacks} for t in (params, grads))
    with mock.patch.object(ModelConfig, "blocks", return_value=single):
        return *differentiated(config, apart), want


@pytest.mark.parametrize("way", FIRST)
def test_every_parameter_has_a_finite_gradient_and_another_way_to_compute_it_gives_the_same(way, random_params):
    """Layers one by one instead of in a loop; or their insides computed twice, with what is dropped dropped again."""

    @settings(max_examples=DRAWN, **no_shrinking)
    @given(st.integers(0, 10**6))
    def check(seed):
        config = model_of(seed + FIRST[way])
        note(str(config))
        train = way != "loop"
        config = dataclasses.replace(config, dropout=0.2 * train)
        params = random_params(config)
        loss, grads = differentiated(config, params, train=train)
        assert np.isfinite(loss)
        largest = max(np.abs(g).max() for g in jax.tree.leaves(grads))
        for path, g in paths(grads).items():
            assert np.isfinite(g).all(), path
            if path.split("/")[-1] not in WITHOUT_GRADIENT:
                assert np.abs(g).max() > 1e-6 * largest, path
        again, got, want = as_compared(way, config, params, grads)
        np.testing.assert_allclose(again, loss, rtol=1e-5)
        close(got, want)

    check()


def test_rematerialisation_is_turned_on():
    config = model_of(0)
    params = map_params(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), model_params(config))
    for remat in ("none", "dots", "full"):
        traced = jax.make_jaxpr(lambda p, r=remat: apply(Transformer(config, remat=r), p, batch_of(config)).x)(params)
        assert ("remat" in str(traced)) == (remat != "none")


def unstacked(config: ModelConfig, stack: Any) -> Any:
    """Every layer a block of its own."""
    blocks = config.blocks()
    apart = {name: part for name, part in stack.items() if not name.startswith("block_")}
    for block in blocks:
        for repeat in range(block.repeats):
            for i in range(len(block.kinds)):
                layer = stack[f"block_{block.first}"][f"layer_{i}"]
                number = block.first + repeat * len(block.kinds) + i
                apart[f"block_{number}"] = {"layer_0": jax.tree.map(lambda p, r=repeat: p[r : r + 1], layer)}
    return apart
