"""What each lever does to the numbers: loss and every gradient against float32, updates against those of float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.optimizer import OptimizerConfig, stochastic
from tests.experiments.test_step import SEQS, batch, gradients, make
from transformer.accounting import state_bytes_per_device
from transformer.sharding import Layout

PRECISIONS = {"bf16": 0.02, "fp8": 0.15, "int8": 0.02}
"""Largest root mean square of a gradient's difference from float32, over that of the gradient; docs/memory.md says so."""


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", [Layout(), Layout(fsdp=2, tensor=2)], ids=str)
def test_loss_and_every_gradient_are_near_float32(precision, layout):
    want = gradients(make("llama", Layout()))
    got = gradients(make("llama", layout, precision=precision, remat="full"))
    assert got[0] == pytest.approx(want[0], rel=1e-3)
    worst = 0.0
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        worst = max(worst, float(np.sqrt(np.mean(np.square(a - b)) / np.mean(np.square(b)))))
    assert PRECISIONS[precision] / 20 < worst < PRECISIONS[precision]  # not above, and not as if nothing were rounded


def test_rounding_by_chance_is_right_on_the_mean():
    """A third of the way from 1 to the next number of 16 bit; and numbers that have no next."""
    x = jnp.full(40_000, 1 + 2**-7 / 3, jnp.float32)
    got = stochastic(jax.random.key(0), x).astype(jnp.float32)
    assert set(np.unique(got)) == {1.0, 1 + 2**-7}
    assert float(got.mean() - 1) == pytest.approx(2**-7 / 3, rel=0.03)  # 3 standard errors are 0.02
    odd = jnp.asarray([0.0, -0.0, -1.0, jnp.inf, -jnp.inf, jnp.nan, -3.5], jnp.float32)
    np.testing.assert_array_equal(stochastic(jax.random.key(1), odd).astype(jnp.float32), odd)


def trained(steps: int, **changes) -> tuple[float, dict]:
    optimizer = OptimizerConfig(learning_rate=3e-4, warmup_steps=0, total_steps=10_000)
    step = make("llama", Layout(), optimizer=optimizer, **changes)
    state, rows = step.init(jax.random.key(0)), step.place(batch(step.config), SEQS)
    for _ in range(steps):
        state, metrics = step.step(state, rows)
    return float(metrics["loss"]), jax.device_get(state)


def test_weights_of_16_bit_learn_as_those_of_32(monkeypatch):
    """Steps of 3e-4 are less than half of what separates two such numbers above 0.15: to the nearest, norms of 1 stall."""
    (wide, state32), (narrow, state16) = trained(40), trained(40, weights="bf16")
    assert {a.dtype for a in jax.tree.leaves(state16.params)} == {jnp.dtype(jnp.bfloat16)}
    assert {a.dtype for a in jax.tree.leaves(state16.opt_state) if a.ndim} == {jnp.dtype(jnp.float32)}
    monkeypatch.setattr("experiments.optimizer.stochastic", lambda _, x: x.astype(jnp.bfloat16))
    nearest, stalled = trained(40, weights="bf16")
    first, _ = trained(1)
    assert first - wide > 0.2
    assert abs(narrow - wide) < 0.05 * (first - wide) < abs(nearest - wide)

    def scale(state) -> np.ndarray:
        return np.asarray(state.params["decoder"]["final_norm"]["scale"], np.float32)

    moved = np.abs(scale(state32) - 1).mean()
    assert np.abs(scale(stalled) - 1).max() == 0
    assert np.abs(scale(state16) - 1).mean() == pytest.approx(moved, rel=0.5)
    print(first, wide, narrow, nearest, moved)


@pytest.mark.parametrize("layout", [Layout(fsdp=4, tensor=2), Layout()], ids=str)
def test_state_bytes_of_levers(layout):
    step = make("dropless", layout, weights="bf16", offload_optimizer=True)

    def held(tree) -> int:
        arrays = [a for a in jax.tree.leaves(tree) if a.ndim]
        return sum(int(np.prod(a.sharding.shard_shape(a.shape))) * a.dtype.itemsize for a in arrays)

    got = state_bytes_per_device(step.table, layout, "bf16", offload_optimizer=True)
    state = step.abstract_state
    assert got == {"params": held(state.params), "optimizer": 0, "host": held(state.opt_state)}
    assert {a.sharding.memory_kind for a in jax.tree.leaves(state.opt_state) if a.ndim} == {"pinned_host"}


def test_moments_in_the_host_change_no_bit():
    states = [trained(3, offload_optimizer=there)[1] for there in (False, True)]
    jax.tree.map(np.testing.assert_array_equal, *states)
