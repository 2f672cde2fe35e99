"""Sharded equals unsharded for every family; parts equal the whole; nothing is compiled twice."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.optimizer import OptimizerConfig
from experiments.step import TrainStep, objective_of
from tests.transformer.test_chunkwise import backward, forward
from transformer import cudnn_calls
from transformer.config import ModelConfig
from transformer.models import init
from transformer.presets import preset
from transformer.sharding import Layout, make_mesh

SMALL = {
    "n_layers": 2, "d_model": 16, "n_heads": 8, "n_kv_heads": 8, "d_head": 6, "d_ff": 32, "vocab_size": 61,
    "max_len": 32, "vocab_multiple": 8,
}  # fmt: skip
MOE = {"n_experts": 4, "experts_per_token": 2}
CONFIGS = {
    "llama": {},
    "grouped": {"n_kv_heads": 2},
    "palm": {
        "n_kv_heads": 1, "parallel": True, "bias": True, "position": "alibi", "score": "additive", "sinks": True,
    },
    "gpt": {"position": "learned", "norm": "layer", "ffn": "gelu", "bias": True, "tied": True},
    "gemma": {
        "n_layers": 3, "window": 3, "global_every": 2, "norm_placement": "sandwich", "ffn": "geglu", "qk_norm": True,
        "score_cap": 5.0, "logit_cap": 3.0, "embed_scale": True,
    },
    "bert": {
        "family": "encoder", "norm_placement": "post", "norm": "layer", "position": "learned", "token_types": 2,
        "embed_norm": True, "head_transform": True, "head_bias": True, "tied": True, "bias": True, "ffn": "gelu_exact",
    },
    "t5": {
        "family": "encoder_decoder", "position": "relative", "score": "dot", "ffn": "relu", "tied": True,
        "logit_scale": 0.25, "init": "t5",
    },
    "prefix": {"prefix": True, "position": "alibi", "z_loss": 1e-2, "label_smoothing": 0.1},
    "dropless": {**MOE, "balance_loss": 0.01, "n_shared_experts": 1, "d_expert": 16, "balance_rate": 1e-3},
    "capacity": {**MOE, "capacity_factor": 1.0},
    "latent": {"kv_rank": 8, "q_rank": 16, "d_rope": 2, "d_value": 4, **MOE, "router": "sigmoid", "n_dense_layers": 1},
}  # fmt: skip
LAYOUTS = [Layout(data=8), Layout(fsdp=8), Layout(tensor=8), Layout(data=2, fsdp=2, tensor=2), Layout(data=4, tensor=2)]
SEQS, LENGTH = 8, 16


def batch(config: ModelConfig, seqs: int = SEQS, length: int = LENGTH) -> dict[str, np.ndarray]:
    """Random tokens, weights that differ, and where there are pairs two of them in a row."""
    rng = np.random.default_rng(0)
    step = TrainStep(config=config, mesh=make_mesh(Layout()))
    rows = {}
    for name, array in step.abstract_batch(seqs, length).items():
        if name == "weights":
            rows[name] = (rng.random(array.shape) < 0.7).astype(np.float32)
        elif name == "prefix":
            rows[name] = rng.integers(1, length, array.shape, dtype=np.int32)
        elif name.endswith("segments"):
            rows[name] = np.sort(rng.integers(1, 3, array.shape, dtype=np.int32), axis=1)
        elif name.endswith("positions"):
            rows[name] = np.broadcast_to(np.arange(length, dtype=np.int32), array.shape).copy()
        else:
            rows[name] = rng.integers(0, config.vocab_size, array.shape, dtype=np.int32)
    return rows


def make(name: str, layout: Layout, n_layers: int | None = None, **changes) -> TrainStep:
    backend = "blockwise" if layout.context > 1 else "xla"
    changes = (
        {"backend": backend}
        | {"precision": "f32", "zero": layout.zero, "ring": bool(layout.ring), "repeats": layout.repeats}
        | changes
    )
    return TrainStep(
        config=ModelConfig(**SMALL | CONFIGS[name] | ({"n_layers": n_layers} if n_layers else {})),
        mesh=make_mesh(layout),
        **changes,
    )


@cache
def fresh(config: ModelConfig):
    """Initial parameters on the host, made once for each model."""
    return jax.device_get(jax.jit(init, static_argnums=0)(config, jax.random.key(0)))


def gradients(step: TrainStep, seqs: int = SEQS):
    params = jax.device_put(fresh(step.config), step.state_shardings.params)
    found = jax.jit(step.gradients)(params, step.place(batch(step.config, seqs), seqs))
    return float(found.loss), jax.device_get(found.grads)


def assert_close(got, want, tolerance=2e-5):
    """Every gradient within `tolerance` of its own largest entry, or of a thousandth of the largest of all: the
    gradient of a key's bias is nothing but rounding, for a softmax does not see it."""
    floor = 1e-3 * max(np.abs(g).max() for g in jax.tree.leaves(want))

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), floor))

    jax.tree.map(close, got, want)


@pytest.fixture(scope="module")
def unsharded():
    known = {}

    def of(name):
        if name not in known:
            known[name] = gradients(make(name, Layout()))
        return known[name]

    return of


FITTING = [("llama", layout) for layout in LAYOUTS]
FITTING += [(name, Layout(data=2, fsdp=2, tensor=2)) for name in CONFIGS if name != "llama"]
FITTING += [(name, Layout(context=4, data=2)) for name in CONFIGS if name != "capacity"]
FITTING += [(name, Layout(context=2, fsdp=2, tensor=2, ring=1)) for name in CONFIGS if name != "capacity"]
FITTING += [("llama", Layout(context=4, tensor=2, zero=1, ring=1)), ("dropless", Layout(context=2, expert=2, data=2))]
FITTING += [("palm", Layout(tensor=8))]
FITTING += [("gpt", Layout(slice=2, fsdp=4, zero=zero)) for zero in (1, 2)]
FITTING += [("dropless", Layout(data=2, fsdp=2, tensor=2, zero=1)), ("capacity", Layout(fsdp=4, tensor=2, zero=1))]
FITTING += [(name, Layout(expert=4, fsdp=2)) for name in ("dropless", "capacity", "latent")]
FITTING += [(name, Layout(data=2, expert=2, tensor=2, zero=1)) for name in ("dropless", "capacity")]


@pytest.mark.parametrize(("name", "layout"), FITTING, ids=str)
def test_sharded_loss_and_every_gradient_equal_the_unsharded(name, layout, unsharded):
    loss, grads = gradients(make(name, layout))
    assert loss == pytest.approx(unsharded(name)[0], rel=1e-5)
    assert_close(grads, unsharded(name)[1])


STAGED = [
    ("llama", Layout(pipeline=2), 4), ("llama", Layout(pipeline=4, fsdp=2), 4), ("llama", Layout(pipeline=2, repeats=2), 4),
    ("gpt", Layout(pipeline=2, tensor=2, data=2), 2), ("bert", Layout(pipeline=2, fsdp=2, zero=1), 4),
    ("prefix", Layout(pipeline=2, context=2, fsdp=2), 2), ("dropless", Layout(pipeline=2, expert=2, fsdp=2, repeats=2), 2),
    ("grouped", Layout(pipeline=4, tensor=2, zero=1), 8), ("capacity", Layout(pipeline=2, expert=2, tensor=2, zero=1), 2),
]  # fmt: skip


@pytest.mark.parametrize(("name", "layout", "microbatches"), STAGED, ids=str)
def test_stages_of_a_pipeline_equal_the_unsharded(name, layout, microbatches):
    """Four layers; a stage has one or two, in one part or two."""
    whole = make(name, Layout(), n_layers=4)
    want = gradients(whole)
    loss, grads = gradients(make(name, layout, microbatches=microbatches, n_layers=4))
    assert loss == pytest.approx(want[0], rel=1e-5)
    assert_close(grads, want[1])


CHUNKED = [
    ("llama", Layout(context=4, data=2, ring=1), "none", 1), ("bert", Layout(context=2, fsdp=2, tensor=2), "dots", 1),
    ("grouped", Layout(pipeline=2, context=2, tensor=2, zero=1), "full", 4),
    ("llama", Layout(pipeline=2, context=2, data=2, ring=1), "dots", 4),
]  # fmt: skip


@pytest.mark.parametrize(("name", "layout", "remat", "microbatches"), CHUNKED, ids=str)
def test_chunks_of_a_fused_kernel_equal_the_unsharded(name, layout, remat, microbatches, monkeypatch):
    """cuDNN's part is played by a stand-in. Stages are mapped over, and keep or make again what chunks made."""
    monkeypatch.setattr(cudnn_calls, "forward", forward)
    monkeypatch.setattr(cudnn_calls, "backward", backward)
    n_layers = 3 if layout.pipeline > 1 else 2
    want = gradients(make(name, Layout(), n_layers=n_layers))
    changes = {"n_layers": n_layers, "remat": remat, "microbatches": microbatches}
    loss, grads = gradients(make(name, layout, backend="cudnn", **changes))
    assert loss == pytest.approx(want[0], rel=1e-5)
    assert_close(grads, want[1])


UNEVEN = [
    ("llama", 5, Layout(pipeline=4, fsdp=2), 4), ("gpt", 7, Layout(pipeline=2, repeats=2, tensor=2), 4),
    ("dropless", 3, Layout(pipeline=2, expert=2, zero=1), 3), ("latent", 4, Layout(pipeline=2, fsdp=2), 3),
    ("latent", 6, Layout(pipeline=2, repeats=2, tensor=2, zero=1), 4),
]  # fmt: skip


@pytest.mark.parametrize(("name", "n_layers", "layout", "microbatches"), UNEVEN, ids=str)
def test_layers_that_do_not_divide_among_stages_equal_the_unsharded(name, n_layers, layout, microbatches):
    """The last parts have fewer; the latent model's first layer has no experts, and goes before the stages."""
    seqs = 2 * microbatches * layout.data_shards
    want = gradients(make(name, Layout(), n_layers=n_layers), seqs)
    loss, grads = gradients(make(name, layout, microbatches=microbatches, n_layers=n_layers), seqs)
    assert loss == pytest.approx(want[0], rel=1e-5)
    assert_close(grads, want[1])


@pytest.mark.parametrize(("name", "remat"), [("llama", "full"), ("dropless", "dots"), ("t5", "full")])
def test_rematerialisation_changes_no_gradient(name, remat, unsharded):
    loss, grads = gradients(make(name, Layout(fsdp=4), remat=remat))
    assert loss == pytest.approx(unsharded(name)[0], rel=1e-5)
    assert_close(grads, unsharded(name)[1])


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["llama", "bert", "dropless"])
def test_microbatches_add_up_to_the_whole_batch(name, unsharded):
    """Also where the parts' weights differ, and where a loss of the experts' balance is added."""
    loss, grads = gradients(make(name, Layout(data=2), microbatches=4))
    assert loss == pytest.approx(unsharded(name)[0], rel=1e-5)
    assert_close(grads, unsharded(name)[1])


def test_gradient_is_of_the_weighted_mean(unsharded):
    """A finite difference along the gradient, where the slope is its squared length."""
    step = make("bert", Layout())
    rows = step.place(batch(step.config), SEQS)
    grads = unsharded("bert")[1]

    def mean(t: float) -> float:
        total, weight = step.loss(jax.tree.map(lambda p, g: p + t * g, fresh(step.config), grads), rows)
        assert float(weight) == batch(step.config)["weights"].sum()
        return float(total) / float(weight)

    slope = sum(float(np.square(g).sum()) for g in jax.tree.leaves(grads))
    assert (mean(1e-2) - mean(-1e-2)) / 2e-2 == pytest.approx(slope, rel=0.02)


def test_second_step_does_not_compile_and_reuses_the_state():
    step = make("llama", Layout(fsdp=2, data=4))
    state = step.init(jax.random.key(0))
    rows = step.place(batch(step.config), SEQS)
    first, _ = step.step(state, rows)
    assert jax.tree.leaves(state.params)[0].is_deleted()
    step.step(first, rows)
    assert step.step._cache_size() == 1


def test_dropout_differs_by_step_and_repeats_by_seed():
    config = ModelConfig(**SMALL | {"dropout": 0.3, "init_std": 0.5})
    rows = batch(config)

    def losses(seed: int) -> list[float]:
        step = TrainStep(config=config, mesh=make_mesh(Layout()), precision="f32", seed=seed)
        run = jax.jit(step.gradients)
        return [float(run(fresh(config), step.place(rows, SEQS), at).loss) for at in (1, 1, 2)]

    (first, again, later), (other, *_) = losses(0), losses(1)
    assert first == again
    assert len({first, later, other}) == 3


def test_router_biases_move_towards_an_even_load():
    step = make("dropless", Layout(data=2), optimizer=OptimizerConfig(learning_rate=1e-9, warmup_steps=0))
    state = step.init(jax.random.key(0))
    rows = step.place(batch(step.config), SEQS)
    counts = jax.jit(step.gradients)(state.params, rows).loads["decoder"]["block_0"]["layer_0"].counts
    assert counts.shape == (2, 4)
    np.testing.assert_array_equal(counts.sum(-1), SEQS * LENGTH * 2)
    want = 1e-3 * np.sign(SEQS * LENGTH * 2 / 4 - np.asarray(counts))
    state, _ = step.step(state, rows)
    got = state.params["decoder"]["block_0"]["layer_0"]["experts"]["b_router"]
    np.testing.assert_allclose(got, want, atol=1e-7)


def test_state_stays_float32_under_bf16_compute():
    step = TrainStep(config=preset("tiny", {"n_layers": "2"}), mesh=make_mesh(Layout()), precision="bf16")
    rows = batch(step.config)
    state, metrics = step.step(step.init(jax.random.key(0)), step.place(rows, SEQS))
    assert {a.dtype for a in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert np.isfinite(float(metrics["loss"]))


@pytest.mark.parametrize("name", ["gpt", "latent"])
def test_vectors_do_not_decay_and_matrices_do(name):
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.5)
    step = make(name, Layout(), optimizer=optimizer)
    params = jax.tree.map(lambda p: p + 1.0, fresh(step.config))
    transform = optimizer.make(step.table)
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(transform.update)(still, jax.jit(transform.init)(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        leaf = where.rpartition("/")[2]
        is_matrix = leaf.startswith(("w_", "tokens", "positions", "shared_w")) and leaf != "w_score"
        assert bool(np.any(np.asarray(update) != 0)) == is_matrix, where


def test_fsdp_gathers_and_reduces_and_nothing_else():
    step = make("llama", Layout(fsdp=8))
    text = step.step.lower(step.abstract_state, step.abstract_batch(8, 32)).compile().as_text()
    assert "all-gather" in text
    assert "reduce-scatter" in text or "all-reduce" in text
    assert "all-to-all" not in text
    assert "collective-permute" not in text


@pytest.mark.parametrize("name", ["dropless", "capacity"])
def test_experts_talk_to_nobody_about_tokens(name):
    """Under data parallelism the choice, the sorting and the products of experts stay on their device."""
    step = make(name, Layout(data=8))
    text = step.step.lower(step.abstract_state, step.abstract_batch(8, 32)).compile().as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert f" {collective}(" not in text, collective


@pytest.mark.parametrize(
    ("name", "objective"), [("llama", "causal"), ("prefix", "prefix"), ("bert", "masked"), ("t5", "pairs")]
)
def test_family_says_what_is_predicted(name, objective):
    assert objective_of(ModelConfig(**SMALL | CONFIGS[name])) == objective


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_a_stage_keeps_streams_and_no_weights(remat):
    """Its scan would keep a layer's matrices once a microbatch; of `full` no more than the stream and its places."""
    step = make("llama", Layout(pipeline=2, fsdp=2), n_layers=4, microbatches=4, remat=remat)
    traced = jax.make_jaxpr(step.gradients)(step.abstract_state.params, step.abstract_batch(SEQS, LENGTH))
    loops = [e for e in traced.jaxpr.eqns if e.primitive.name == "scan"]
    kept = [v.aval.shape for e in loops for v in e.outvars if len(v.aval.shape) > 3 and v.aval.shape[:3] == (2, 3, 2)]
    assert (2, 3, 2, 2, 16, 16) in kept  # stages, microbatches on their way, layers: the stream
    assert not [shape for shape in kept if shape[3:] in ((16, 32), (32, 16), (16, 8, 6))]
    large = [shape[3:] for shape in kept if math.prod(shape[3:]) > LENGTH]
    assert (set(large) == {(2, 16, 16)}) == (remat == "full")


@pytest.mark.parametrize(("remat", "layout"), [("none", Layout(pipeline=2)), ("dots", Layout(pipeline=2, tensor=2))])
def test_rematerialisation_in_stages_changes_no_gradient(remat, layout):
    want = gradients(make("llama", Layout(), n_layers=4))
    loss, grads = gradients(make("llama", layout, n_layers=4, microbatches=4, remat=remat))
    assert loss == pytest.approx(want[0], rel=1e-5)
    assert_close(grads, want[1])
