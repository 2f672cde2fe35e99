"""Rules that cannot apply raise; the mesh is Auto; attention over data talks to nobody."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from transformer.attention import attend, causal_mask
from transformer.config import PRESETS, preset
from transformer.errors import RequestError
from transformer.models import decoder_params
from transformer.params import Param, leaves, zeros
from transformer.sharding import (
    ACTIVATION_RULES,
    AXES,
    DIMS,
    PARAMETER_RULES,
    UNSHARDED,
    Layout,
    OnMesh,
    Shard,
    check_divides,
    make_mesh,
    param_shardings,
    spec,
)

COLLECTIVE = re.compile(r"\b(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\b")


def test_spec_names_the_axis_of_every_dim():
    assert spec(("embed", "kv_heads", "group", "head"), PARAMETER_RULES) == P("fsdp", "tensor", None, None)
    assert spec(("embed", "kv_heads", "group", "head"), ACTIVATION_RULES) == P(None, "tensor", None, None)
    assert spec(("batch", "length"), ACTIVATION_RULES) == P(("data", "fsdp"), None)


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
        ({"n_kv_heads": "2"}, Layout(tensor=8), "layers/attention/w_q: dim 'kv_heads' is 2, which tensor=8 does not divide; nearest: tensor=2"),
        ({"d_ff": "12"}, Layout(tensor=8), "layers/ffn/w_up: dim 'ffn' is 12, which tensor=8 does not divide; nearest: tensor=6"),
        ({"d_model": "20"}, Layout(fsdp=8), "embedding/tokens: dim 'embed' is 20, which fsdp=8 does not divide; nearest: fsdp=10"),
        ({"vocab_multiple": "1"}, Layout(tensor=16), "embedding/tokens: dim 'vocab' is 264, which tensor=16 does not divide; nearest: tensor=12"),
    ],
)  # fmt: skip
def test_message_names_tensor_dim_both_numbers_and_the_nearest(overrides, layout, message):
    with pytest.raises(RequestError) as caught:
        check_divides(decoder_params(preset("tiny", overrides)), layout)
    assert str(caught.value) == message


@pytest.mark.parametrize("layout", [Layout(), Layout(data=8), Layout(fsdp=8), Layout(tensor=8), Layout(2, 2, 2)])
def test_tiny_fits_every_axis(layout):
    check_divides(decoder_params(preset("tiny")), layout)


def test_what_only_compute_splits_is_checked_too():
    """`data` splits no parameter dim: sizes that divide nothing pass."""
    check_divides({"w": Param((7,), ("embed",), zeros)}, Layout(data=3))
    with pytest.raises(RequestError, match="w: dim 'embed' is 7, which fsdp=3"):
        check_divides({"w": Param((7,), ("embed",), zeros)}, Layout(fsdp=3))


@pytest.mark.parametrize("name", PRESETS)
def test_every_matrix_of_every_preset_is_split_over_both_axes(name):
    """Storage per device falls with fsdp x tensor: only vectors, and positions over tensor, stay whole."""
    for path, param in leaves(decoder_params(preset(name))):
        axes = {axis for axis in spec(param.dims, PARAMETER_RULES) if axis}
        if path == "embedding/positions":
            assert axes == {"fsdp"}
        elif "embed" in param.dims:
            assert axes == {"fsdp", "tensor"}, path
        else:
            assert axes <= {"tensor"}, path


@pytest.mark.smoke
def test_mesh_is_auto(eight_devices):
    mesh = make_mesh(Layout(2, 2, 2))
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert [d.id for d in mesh.devices.ravel()] == [d.id for d in eight_devices]  # tensor innermost
    assert list(make_mesh(Layout(tensor=2), eight_devices[4:]).devices.ravel()) == eight_devices[4:6]


def test_too_few_devices_are_named():
    with pytest.raises(RequestError, match=r"tensor=16\) needs 16 devices, 8 are attached"):
        make_mesh(Layout(tensor=16))


def test_layout_counts():
    layout = Layout(data=3, fsdp=5, tensor=7)
    assert (layout.n_devices, layout.data_shards, layout.sizes) == (105, 15, (3, 5, 7))


def test_data_parallel_attention_talks_to_nobody(eight_devices):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(8, 5, 3, *g, 7)), jnp.float32) for g in ((2,), (), ()))
    mask = jnp.broadcast_to(causal_mask(5), (8, 5, 5))
    mesh = make_mesh(Layout(data=8))
    args = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (q, k, v, mask)]
    compiled = jax.jit(attend).lower(*args).compile()
    assert not COLLECTIVE.search(compiled.as_text())
    got = compiled(*args)
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), got.ndim)
    np.testing.assert_allclose(got, attend(q, k, v, mask), rtol=1e-6, atol=1e-6)
    # the pattern does see a collective where there is one
    assert COLLECTIVE.search(jax.jit(jnp.sum).lower(args[0]).compile().as_text())


def test_weights_are_gathered_for_use_and_their_gradient_goes_back_to_storage(eight_devices):
    mesh = make_mesh(Layout(fsdp=8))
    table = {"w": Param((16, 3), ("embed", "ffn"), zeros)}
    stored = param_shardings(table, mesh)["w"]
    assert stored.spec == P("fsdp", "tensor")
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
    shardings = param_shardings(decoder_params(config), make_mesh(Layout(2, 2, 2)))
    assert shardings["final_norm"]["bias"].is_fully_replicated
    assert shardings["layers"]["ffn_norm"]["scale"].is_fully_replicated
