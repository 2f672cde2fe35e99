"""Rules that cannot apply raise; the mesh is Auto; attention over data talks to nobody."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from transformer.attention import Context, attend, attention, attention_params
from transformer.config import ModelConfig
from transformer.errors import RequestError
from transformer.experts import expert_params, mixture
from transformer.layouts import check_divides
from transformer.losses import cross_entropy
from transformer.masks import Causal, Segments
from transformer.models import Head, model_params
from transformer.params import Param, leaves, zeros
from transformer.placement import (
    UNSHARDED,
    OnMesh,
    Shard,
)
from transformer.positions import Alibi
from transformer.presets import PRESETS, preset
from transformer.sharding import (
    ACTIVATION_RULES,
    AXES,
    DIMS,
    MATRIX_DIMS,
    PARAMETER_RULES,
    Layout,
    axes_of,
    make_mesh,
    param_shardings,
    spec,
)

COLLECTIVE = re.compile(r"\b(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\b")


def test_spec_names_the_axis_of_every_dim():
    assert spec(("embed", "kv_heads", "group", "head"), PARAMETER_RULES) == P(
        ("fsdp", "expert", "context"), "tensor", None, None
    )
    assert spec(("embed", "kv_heads", "group", "head"), ACTIVATION_RULES) == P(None, "tensor", None, None)
    assert spec(("batch", "length"), ACTIVATION_RULES) == P(("slice", "data", "fsdp", "expert"), "context")


def test_unknown_dim_raises():
    with pytest.raises(RequestError, match=r"unknown dim 'embd': did you mean 'embed'\?"):
        spec(("embd", "ffn"), PARAMETER_RULES)


@pytest.mark.smoke
def test_two_dims_on_one_axis_raise():
    with pytest.raises(RequestError, match="two dims on one mesh axis") as caught:
        spec(("vocab", "ffn"), PARAMETER_RULES)
    assert "'vocab', 'ffn'" in str(caught.value)
    with pytest.raises(RequestError, match="two dims on one mesh axis"):  # also where an axis is one of several
        spec(("batch", "embed"), {"batch": ("data", "fsdp"), "embed": "fsdp"})


def test_rules_know_only_dims_and_axes():
    for rules in (PARAMETER_RULES, ACTIVATION_RULES):
        assert set(rules) <= set(DIMS)
        axes = {axis for entry in rules.values() for axis in ([entry] if isinstance(entry, str) else entry or ())}
        assert axes <= set(AXES)


@pytest.mark.parametrize(
    ("overrides", "layout", "message"),
    [
        ({"n_kv_heads": "2"}, Layout(tensor=8), "decoder/block_0/layer_0/attention/w_q: dim 'kv_heads' is 2, which tensor=8 does not divide; nearest: tensor=2"),
        ({"d_ff": "12"}, Layout(tensor=8), "decoder/block_0/layer_0/ffn/w_up: dim 'ffn' is 12, which tensor=8 does not divide; nearest: tensor=6"),
        ({"d_model": "20"}, Layout(fsdp=8), "embedding/tokens: dim 'embed' is 20, which fsdp=8 does not divide; nearest: fsdp=10"),
        ({"vocab_multiple": "1"}, Layout(tensor=16), "embedding/tokens: dim 'vocab' is 264, which tensor=16 does not divide; nearest: tensor=12, or --model.vocab_multiple=16 for unused rows"),
    ],
)  # fmt: skip
def test_message_names_tensor_dim_both_numbers_and_the_nearest(overrides, layout, message):
    with pytest.raises(RequestError) as caught:
        check_divides(model_params(preset("tiny", overrides)), layout)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(data=8), Layout(fsdp=8), Layout(tensor=8), Layout(data=2, fsdp=2, tensor=2)]
)
def test_tiny_fits_every_axis(layout):
    check_divides(model_params(preset("tiny")), layout)


def test_what_only_compute_splits_is_checked_too():
    """`data` splits no parameter dim: sizes that divide nothing pass."""
    check_divides({"w": Param((7,), ("embed",), zeros)}, Layout(data=3))
    with pytest.raises(RequestError, match="w: dim 'embed' is 7, which fsdp=3"):
        check_divides({"w": Param((7,), ("embed",), zeros)}, Layout(fsdp=3))


NARROW = ("positions", "types", "w_router", "w_transform", "w_kv_down", "w_k_rope", "w_q_down")
"""Matrices whose other side no axis splits: that of a router, of a latent, of a place."""


@pytest.mark.parametrize("name", PRESETS)
def test_every_matrix_of_every_preset_is_split_over_both_axes(name):
    """Storage per device falls with fsdp x tensor: only vectors, and of some narrow matrices one side, stay whole."""
    for path, param in leaves(model_params(PRESETS[name])):
        axes = {axis for entry in spec(param.dims, PARAMETER_RULES) for axis in axes_of(entry)} - {"pipeline"}
        for_use = {axis for entry in spec(param.dims, ACTIVATION_RULES) for axis in axes_of(entry)} - {"pipeline"}
        assert for_use <= {"tensor", "expert"}, path  # for use, the others are gathered
        if set(MATRIX_DIMS).isdisjoint(param.dims):
            assert axes <= {"tensor"}, path
        else:
            split = {"fsdp", "expert", "context"}
            narrow = NARROW if PRESETS[name].n_kv_heads > 1 else (*NARROW, "w_k", "w_v")  # one head is not split
            assert axes == (split if path.split("/")[-1] in narrow else split | {"tensor"}), path


@pytest.mark.smoke
def test_mesh_is_auto(eight_devices):
    mesh = make_mesh(Layout(data=2, fsdp=2, tensor=2))
    assert mesh.axis_types == (AxisType.Auto,) * len(AXES)
    assert {axis: n for axis, n in mesh.shape.items() if n > 1} == {"data": 2, "fsdp": 2, "tensor": 2}
    assert [d.id for d in mesh.devices.ravel()] == [d.id for d in eight_devices]  # tensor innermost
    assert list(make_mesh(Layout(tensor=2), eight_devices[4:]).devices.ravel()) == eight_devices[4:6]


def test_too_few_devices_are_named():
    with pytest.raises(RequestError, match=r"layout tensor=16 needs 16 devices, 8 are attached"):
        make_mesh(Layout(tensor=16))


def test_layout_counts():
    layout = Layout(slice=2, pipeline=3, data=5, fsdp=7, expert=11, context=13, tensor=17)
    assert (layout.sizes, layout.data_shards) == ((2, 3, 5, 7, 11, 13, 17), 2 * 5 * 7 * 11)
    assert layout.n_devices == 2 * 3 * 5 * 7 * 11 * 13 * 17
    assert str(Layout(fsdp=8, tensor=2, zero=1)) == "fsdp=8,tensor=2,zero=1"


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def test_data_parallel_attention_talks_to_nobody(eight_devices):
    """Nor does its mask, where each sequence has one of its own."""
    q, k, v = (random(8, 5, 3, *g, 7, seed=i) for i, g in enumerate(((2,), (), ())))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 3, (8, 5)), jnp.int32)
    mesh = make_mesh(Layout(data=8))
    args = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (q, k, v, ids)]

    def read(q, k, v, ids):
        return attend(q, k, v, Causal() & Segments(ids, ids), scale=1.0)

    compiled = jax.jit(read).lower(*args).compile()
    assert not COLLECTIVE.search(compiled.as_text())
    got = compiled(*args)
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), got.ndim)
    np.testing.assert_allclose(got, jax.jit(read)(q, k, v, ids), rtol=1e-6, atol=1e-6)
    # the pattern does see a collective where there is one
    assert COLLECTIVE.search(jax.jit(jnp.sum).lower(args[0]).compile().as_text())


MIXED = Layout(data=2, fsdp=2, tensor=2)
MODEL = ModelConfig(
    n_layers=1, d_model=8, n_heads=8, n_kv_heads=4, d_head=4, d_ff=6, vocab_size=13, max_len=8, vocab_multiple=16,
    position="alibi", sinks=True, qk_norm=True, bias=True, z_loss=0.1, label_smoothing=0.1, head_bias=True,
)  # fmt: skip


def on_and_off_the_mesh(function, table, x):
    """Value, gradient of parameters and of x, and the placed gradient: of function(params, x, shard) unsharded, and
    on a mesh where parameters lie as they are stored."""
    params = {name: 0.5 * random(*p.shape, seed=i) for i, (name, p) in enumerate(table.items())}
    mesh = make_mesh(MIXED)
    placed = {name: jax.device_put(p, param_shardings(table, mesh)[name]) for name, p in params.items()}
    rows = jax.device_put(x, NamedSharding(mesh, spec(("batch", "length", "embed"), ACTIVATION_RULES)))
    results = []
    for shard, p, at in ((UNSHARDED, params, x), (OnMesh(mesh), placed, rows)):

        def loss(p, x, shard=shard):
            out = function(shard.weights(p, table), x, shard)
            direction = jnp.cos(jnp.arange(out[0].size, dtype=jnp.float32)).reshape(out[0].shape)
            return (out[0] * direction).sum(), out

        results.append(jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(p, at))
    assert all(g.sharding.is_equivalent_to(placed[name].sharding, g.ndim) for name, g in results[1][1][0].items())
    return results


def assert_equal(got, want):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1, np.abs(b).max())), got, want
    )


def test_sharded_attention_equals_the_unsharded(eight_devices):
    def run(params, x, shard):
        ids = jnp.repeat(jnp.asarray([[1, 1, 2, 2, 2]]), 4, 0)
        context = Context(jnp.arange(5)[None], bias=Alibi(4, 2))
        out = attention(
            params, x, Causal() & Segments(ids, ids), context,
            kind=MODEL.kind(0), cross=False, config=MODEL, attend=attend, shard=shard,
        )  # fmt: skip
        return (out,)

    assert_equal(*on_and_off_the_mesh(run, attention_params(MODEL), random(4, 5, 8))[::-1])


@pytest.mark.parametrize("capacity", [None, 1.0], ids=["dropless", "capacity"])
def test_sharded_experts_equal_the_unsharded_and_drop_the_same_tokens(capacity, eight_devices):
    config = dataclasses.replace(
        MODEL, n_experts=4, experts_per_token=2, capacity_factor=capacity, n_shared_experts=1, bias=False
    )

    def run(params, x, shard):
        return mixture(params, x, jnp.ones((8, 5)), config=config, shard=shard)

    assert_equal(*on_and_off_the_mesh(run, expert_params(config), random(8, 5, 8))[::-1])


def test_sharded_cross_entropy_equals_the_unsharded(eight_devices, monkeypatch):
    monkeypatch.setattr("transformer.losses.CHUNK_TOKENS", 3)
    targets = jnp.asarray(np.random.default_rng(0).integers(0, 13, (8, 5)), jnp.int32)
    table = {"w": Param((8, 16), ("embed", "vocab"), zeros), "b": Param((16,), ("vocab",), zeros)}

    def run(params, x, shard):
        head = Head(params["w"], params["b"])
        weights = jnp.arange(40.0).reshape(8, 5)
        return (cross_entropy(x, head, targets, weights, config=MODEL, shard=shard)[None],)

    assert_equal(*on_and_off_the_mesh(run, table, random(8, 5, 8))[::-1])


def test_a_local_function_sees_its_devices_part(eight_devices):
    shard, shapes = OnMesh(make_mesh(MIXED)), []
    assert (shard.batch_shards, UNSHARDED.batch_shards) == (4, 1)

    def twice(x, w):
        shapes.append((x.shape, w.shape))
        return 2 * x * w[None]

    x, w = random(8, 6), random(6)
    dims = [("batch", "kv_heads"), ("kv_heads",)]
    got = jax.jit(shard.local(twice, dims, ("batch", "kv_heads")))(x, w)
    assert shapes[-1] == ((2, 3), (3,))
    assert UNSHARDED.local(twice, dims, dims[0]) is twice
    np.testing.assert_allclose(got, 2 * x * w[None], rtol=1e-6)


def test_weights_are_gathered_for_use_and_their_gradient_goes_back_to_storage(eight_devices):
    mesh = make_mesh(Layout(fsdp=8))
    table = {"w": Param((16, 3), ("embed", "ffn"), zeros)}
    stored = param_shardings(table, mesh)["w"]
    assert stored.spec == P(("fsdp", "expert", "context"), "tensor")
    w = jax.device_put(np.arange(48, dtype=np.float32).reshape(16, 3), stored)

    def use(w):
        return OnMesh(mesh).weights({"w": w}, table)["w"]

    used = jax.jit(use)(w)
    assert used.sharding.is_fully_replicated
    np.testing.assert_array_equal(used, w)
    grad = jax.jit(jax.grad(lambda w: (use(w) ** 2).sum()))(w)
    assert grad.sharding.is_equivalent_to(stored, 2)
    np.testing.assert_array_equal(grad, 2 * np.asarray(w))


def test_dims_must_be_as_many_as_the_tensor_has(eight_devices):
    x = jnp.zeros((8, 2))
    for shard in (UNSHARDED, OnMesh(make_mesh(Layout(data=8)))):
        assert isinstance(shard, Shard)
        with pytest.raises(AssertionError, match="batch"):
            shard.activation(x, "batch", "length", "embed")
        np.testing.assert_array_equal(shard.activation(x, "batch", "length"), x)


def test_vectors_are_whole_on_every_device(eight_devices):
    config = dataclasses.replace(preset("tiny"), norm="layer")
    shardings = param_shardings(model_params(config), make_mesh(Layout(data=2, fsdp=2, tensor=2)))
    assert shardings["decoder"]["final_norm"]["bias"].is_fully_replicated
    assert shardings["decoder"]["block_0"]["layer_0"]["ffn_norm"]["scale"].is_fully_replicated
