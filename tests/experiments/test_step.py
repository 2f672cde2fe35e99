"""Sharded equals unsharded; parts equal the whole; nothing is compiled twice."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.step import OptimizerConfig, TrainStep, cross_entropy
from transformer.config import preset
from transformer.sharding import Layout, make_mesh

CONFIGS = {
    "tiny": {"n_layers": "2"},
    "grouped": {"n_layers": "2", "n_kv_heads": "2"},
    "gpt": {"n_layers": "2", "position": "learned", "norm": "layer", "ffn": "gelu", "bias": "true", "tied": "false"},
}
LAYOUTS = [Layout(data=8), Layout(fsdp=8), Layout(tensor=8), Layout(data=2, fsdp=2, tensor=2), Layout(data=4, tensor=2)]


def batch(seqs=8, length=32, vocab=259):
    tokens = np.random.default_rng(0).integers(0, vocab, (seqs, length + 1), dtype=np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def gradients(step, rows):
    params = step.init(jax.random.key(0)).params
    loss, grads = jax.jit(step.gradients)(params, step.place(rows, len(rows["inputs"])))
    return float(loss), jax.device_get(grads)


def make(name, layout, **changes):
    return TrainStep(config=preset("tiny", CONFIGS[name]), mesh=make_mesh(layout), precision="f32", **changes)


def assert_close(got, want, tolerance=1e-5):
    """Every gradient within `tolerance` of its own largest entry, or of a millionth of the largest of all: the
    gradient of a key's bias is nothing but rounding, for a softmax does not see it."""
    floor = 1e-6 * max(np.abs(g).max() for g in jax.tree.leaves(want))

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), floor / tolerance))

    jax.tree.map(close, got, want)


@pytest.fixture(scope="module")
def unsharded():
    return {name: gradients(make(name, Layout()), batch()) for name in CONFIGS}


FITTING = [(name, layout) for name in CONFIGS for layout in LAYOUTS if name != "grouped" or layout.tensor <= 2]


@pytest.mark.parametrize(("name", "layout"), FITTING, ids=str)
def test_sharded_loss_and_every_gradient_equal_the_unsharded(name, layout, unsharded):
    loss, grads = gradients(make(name, layout), batch())
    assert loss == pytest.approx(unsharded[name][0], rel=1e-6)
    assert_close(grads, unsharded[name][1])


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_no_gradient(remat, unsharded):
    loss, grads = gradients(make("tiny", Layout(fsdp=4), remat=remat), batch())
    assert loss == pytest.approx(unsharded["tiny"][0], rel=1e-6)
    assert_close(grads, unsharded["tiny"][1])


@pytest.mark.smoke
def test_microbatches_add_up_to_the_whole_batch(unsharded):
    loss, grads = gradients(make("tiny", Layout(data=2), microbatches=4), batch())
    assert loss == pytest.approx(unsharded["tiny"][0], rel=1e-6)
    assert_close(grads, unsharded["tiny"][1])


def test_cross_entropy_is_optaxs_and_by_hand():
    logits = jnp.array([[[0.0, 0.0], [jnp.log(3.0), 0.0]]])
    targets = jnp.array([[0, 1]])
    assert float(cross_entropy(logits, targets)) == pytest.approx((np.log(2) + np.log(4)) / 2)
    many = jax.random.normal(jax.random.key(0), (2, 5, 7))
    ids = jax.random.randint(jax.random.key(1), (2, 5), 0, 7)
    want = optax.softmax_cross_entropy_with_integer_labels(many, ids).mean()
    assert float(cross_entropy(many, ids)) == pytest.approx(float(want), rel=1e-6)


def test_second_step_does_not_compile_and_reuses_the_state():
    step = make("tiny", Layout(fsdp=2, data=4))
    state = step.init(jax.random.key(0))
    rows = step.place(batch(), 8)
    first, _ = step.step(state, rows)
    assert jax.tree.leaves(state.params)[0].is_deleted()
    step.step(first, rows)
    assert step.step._cache_size() == 1


def test_state_stays_float32_under_bf16_compute():
    step = TrainStep(config=preset("tiny", CONFIGS["tiny"]), mesh=make_mesh(Layout()), precision="bf16")
    state, metrics = step.step(step.init(jax.random.key(0)), step.place(batch(), 8))
    assert {a.dtype for a in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert np.isfinite(float(metrics["loss"]))


def test_vectors_do_not_decay_and_matrices_do():
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.5)
    step = make("gpt", Layout(), optimizer=optimizer)
    params = jax.tree.map(lambda p: p + 1.0, step.init(jax.random.key(0)).params)
    transform = optimizer.make(step.table)
    updates, _ = transform.update(jax.tree.map(jnp.zeros_like, params), transform.init(params), params)
    moved = {
        jax.tree_util.keystr(path, simple=True, separator="/"): bool(np.any(np.asarray(u) != 0))
        for path, u in jax.tree_util.tree_leaves_with_path(updates)
    }
    assert moved["layers/ffn/w_up"]
    assert moved["embedding/tokens"]
    for name in (
        "layers/ffn/b_up",
        "layers/attention/b_q",
        "layers/ffn_norm/scale",
        "layers/ffn_norm/bias",
        "final_norm/scale",
    ):
        assert not moved[name], name


def test_fsdp_gathers_and_reduces_and_nothing_else():
    step = make("tiny", Layout(fsdp=8))
    text = step.step.lower(step.abstract_state, step.abstract_batch(8, 32)).compile().as_text()
    assert "all-gather" in text
    assert "reduce-scatter" in text or "all-reduce" in text
    assert "all-to-all" not in text
    assert "collective-permute" not in text
