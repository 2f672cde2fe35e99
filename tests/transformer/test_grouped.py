"""Experts at once against experts block by block and against every expert on every token; the kernels themselves where
Pallas can play them, and on a Hopper GPU."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.experiments.test_step import assert_close, gradients, make
from transformer import hopper
from transformer.backends import Chip
from transformer.config import ModelConfig
from transformer.dropless import block_size, dropless, n_blocks_of, n_rows_of
from transformer.errors import RequestError
from transformer.feed_forward import activate
from transformer.grouped import Tiles, choose, grouped_dot
from transformer.presets import preset
from transformer.sharding import Layout

JAX = tuple(int(part) for part in jax.__version__.split(".")[:2])
HOPPER = Chip("gpu", (9, 0))


def rows_product(x: jax.Array, w: jax.Array, expert_of: jax.Array, *, turned: bool = False) -> jax.Array:
    """The kernel's contract in plain JAX: rows of no expert are garbage, the worst there is."""
    tiles = x.reshape(len(expert_of), -1, x.shape[-1])
    y = jnp.einsum("nmi,nio->nmo", tiles, (w.mT if turned else w)[jnp.minimum(expert_of, len(w) - 1)])
    return jnp.where((expert_of < len(w))[:, None, None], y, jnp.nan).reshape(len(x), -1)


def weights_product(x: jax.Array, dy: jax.Array, first: jax.Array, n_tiles: jax.Array, total: int) -> jax.Array:
    i = jnp.arange(total)[None]
    mine = (first[:, None] <= i) & (i < (first + n_tiles)[:, None])
    x, dy = (t.reshape(total, -1, t.shape[-1]) for t in (x, dy))
    seen = mine.any(0)[:, None, None]
    x, dy = jnp.where(seen, x, 0), jnp.where(seen, dy, 0)  # rows of none are not read
    return jnp.einsum("en,nmd,nmf->edf", mine.astype(x.dtype), x, dy)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hopper, "rows_product", rows_product)
    monkeypatch.setattr(hopper, "weights_product", weights_product)


def case(slots: list[int], k: int, n_experts: int, gated: bool) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    rng = np.random.default_rng(0)

    def of(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    w = {"w_up": of(n_experts, 6, 5), "w_down": of(n_experts, 5, 6)} | (
        {"w_gate": of(n_experts, 6, 5)} if gated else {}
    )
    return of(len(slots) // k, 6), jnp.asarray(slots), w


def everywhere(x: jax.Array, slots: jax.Array, w: dict[str, jax.Array], ffn: str) -> jax.Array:
    """Every expert on every token, and of that what was chosen; of no expert 0."""
    up = jnp.einsum("td,edf->tef", x, w["w_up"])
    gate = jnp.einsum("td,edf->tef", x, w["w_gate"]) if "w_gate" in w else None
    y = jnp.einsum("tef,efd->ted", activate(up, gate, ffn), w["w_down"])
    chosen = jax.nn.one_hot(slots.reshape(len(x), -1), len(w["w_up"]))  # 0 where it is none
    return jnp.einsum("tke,ted->tkd", chosen, y).reshape(len(slots), -1)


@pytest.mark.smoke
@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("ffn", ["swiglu", "relu2"])
@pytest.mark.parametrize(
    ("slots", "k", "n_experts"),
    [
        ([0, 1, 2, 0, 1, 0], 2, 3),
        ([2, 2, 2, 2], 1, 4),  # three experts have none, the first and last of them
        ([0, 5, 5, 2, 5, 0, 5, 5], 2, 5),  # 5: no expert's
        ([3, 3, 3], 1, 3),  # nothing but
        ([1] * 300 + [0] * 130 + [2] * 2, 2, 3),  # more than a tile
    ],
    ids=lambda value: str(value)[:24],
)
def test_values_and_gradients_are_those_of_the_loop_and_of_every_expert_everywhere(slots, k, n_experts, ffn):
    x, slots, w = case(slots, k, n_experts, gated=ffn == "swiglu")
    direction = jnp.asarray(np.random.default_rng(1).normal(size=(len(slots), 6)), jnp.float32)

    def found(function: Any) -> Any:
        def loss(x: jax.Array, w: Any) -> tuple[jax.Array, jax.Array]:
            y = function(x, slots, w, ffn=ffn)
            return (y * direction).sum(), y

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(x, w)

    got, looped, plain = map(found, (partial(dropless, experts="grouped"), dropless, everywhere))
    for want in (looped, plain):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3), got, want)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("layout", "remat"),
    [
        (Layout(), "full"),
        (Layout(expert=4, fsdp=2), "dots"),
        (Layout(data=2, expert=2, tensor=2, zero=1), "full"),
        (Layout(pipeline=2, expert=2, fsdp=2), "none"),
    ],
    ids=str,
)
def test_a_step_has_the_loop_s_gradients_on_every_layout(layout, remat):
    def of(layout: Layout, experts: str, **more: Any) -> Any:
        return gradients(make("dropless", layout, experts=experts, **more))

    microbatches = 2 if layout.pipeline > 1 else 1
    loss, grads = of(layout, "grouped", remat=remat, microbatches=microbatches)
    want_loss, want = of(Layout(), "loop", microbatches=microbatches)
    assert loss == pytest.approx(want_loss, rel=1e-5)
    assert_close(grads, want, 5e-5)


def test_tiles_behind_the_last_run_are_of_no_expert(monkeypatch: pytest.MonkeyPatch):
    """So that the kernels leave them out; multiplied with some expert they would change nothing but the time."""
    asked = []
    monkeypatch.setattr(
        hopper, "rows_product", lambda x, w, expert_of: asked.append(expert_of) or rows_product(x, w, expert_of)
    )
    x, slots, w = case([0] * 65 + [2] * 3 + [4] * 2, 1, 4, gated=False)  # 4: no expert's
    dropless(x, slots, w, ffn="gelu", experts="grouped")
    assert [found.tolist() for found in asked] == [[0, 0, 2, 4, 4]] * 2


def test_rows_are_whole_tiles_and_those_expected_are_the_rest():
    assert (block_size(8192, 8, "grouped"), block_size(4096, 128, "grouped")) == (128, 64)
    for n_slots, n_experts in [(8192, 8), (4096, 128), (10, 256)]:
        every = block_size(n_slots, n_experts, "grouped") * n_blocks_of(n_slots, n_experts, None, "grouped")
        assert n_slots <= n_rows_of(n_slots, n_experts, None, "grouped") <= every
    assert n_rows_of(8 * 8192, 8, 8192, "grouped") == 8192 + 8 * 64  # of a buffer for all that might come


# The kernels.


def tiles_of(counts: list[int], n_tiles: int) -> Tiles:
    expert_of = [e for e, n in enumerate(counts) for _ in range(n)]
    expert_of += [len(counts)] * (n_tiles - len(expert_of))
    return Tiles(*(jnp.asarray(a, jnp.int32) for a in (expert_of, np.cumsum([0, *counts[:-1]]), counts)))


def played(function: Any, *args: Any) -> Any:
    """In Pallas' interpreter: memory that was not written is NaN; a race, and what is out of bounds, is an error."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode

    with force_gpu_interpret_mode(InterpretGPUParams(detect_races=True)):
        return jax.tree.map(partial(np.asarray, dtype=np.float32), function(*args))


def numbers(*shape: int, seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def multiplied(x: Any, w: Any, tiles: Tiles) -> np.ndarray:
    """In numpy, in float32, tile by tile; 0 where there is no expert."""
    x, w = (np.asarray(t, np.float32) for t in (x, w))
    parts = np.split(x, len(tiles.expert_of))
    return np.concatenate([
        part @ w[e] if e < len(w) else np.zeros((len(part), w.shape[-1]), np.float32)
        for part, e in zip(parts, tiles.expert_of.tolist(), strict=True)
    ])  # fmt: skip


@pytest.fixture
def few_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hopper, "MULTIPROCESSORS", 2)


@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize(("high", "d", "f"), [(64, 64, 192), (128, 128, 64)])
def test_the_kernel_multiplies_rows_of_experts_and_leaves_others_alone(high, d, f):
    tiles, x, w = tiles_of([2, 0, 1], 4), numbers(4 * high, d, seed=0), numbers(3, d, f, seed=1)
    got = played(hopper.rows_product, x, w, tiles.expert_of)
    np.testing.assert_allclose(got[: 3 * high], multiplied(x, w, tiles)[: 3 * high], rtol=1e-2, atol=0.1)
    assert np.isnan(got[3 * high :]).all()  # never written


@pytest.mark.skipif(JAX < (0, 12), reason="this release's interpreter multiplies nothing turned")
@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize("mapped", [False, True])
def test_the_kernels_gradients(mapped):
    """Rows of none are NaN in x and in the gradient of y, and come through nowhere."""
    high, d, f = 128, 192, 320
    tiles, x, w, dy = (
        tiles_of([2, 0, 1], 4),
        numbers(4 * high, d, seed=0),
        numbers(3, d, f, seed=1),
        numbers(4 * high, f, seed=2),
    )
    of_none = (jnp.arange(4 * high) >= 3 * high)[:, None]

    def found(x: Any, w: Any, dy: Any) -> Any:
        x, dy = (jnp.where(of_none, jnp.nan, t) for t in (x, dy))
        y, back = jax.vjp(lambda x, w: grouped_dot(3 * high, x, w, tiles), x, w)
        return y, *back(dy)

    if mapped:
        y, dx, dw = (a[1] for a in played(jax.vmap(found), *(jnp.stack([t * 2, t]) for t in (x, w, dy))))
    else:
        y, dx, dw = played(found, x, w, dy)
    rows, near = slice(3 * high), partial(np.testing.assert_allclose, rtol=1e-2, atol=0.2)
    near(y[rows], multiplied(x, w, tiles)[rows])
    near(dx[rows], multiplied(dy, w.mT, tiles)[rows])
    xs, dys = (np.split(np.asarray(t, np.float32), 4) for t in (x, dy))
    near(dw, np.stack([xs[0].T @ dys[0] + xs[1].T @ dys[1], np.zeros((d, f)), xs[2].T @ dys[2]]))


ON_A_GPU = """
import jax, jax.numpy as jnp, numpy as np
from transformer.dropless import dropless

assert jax.devices()[0].compute_capability == "9.0", jax.devices()[0].device_kind
keys = jax.random.split(jax.random.key(0), 6)
T, k, E, D, F = 4096, 2, 16, 512, 384
x = jax.random.normal(keys[0], (T, D), jnp.bfloat16)
w = {"w_up": (E, D, F), "w_gate": (E, D, F), "w_down": (E, F, D)}
w = {name: jax.random.normal(key, s, jnp.bfloat16) * s[1] ** -0.5 for key, (name, s) in zip(keys[1:4], w.items())}
slots = jnp.minimum(jax.random.geometric(keys[4], 0.2, (T * k,)) - 1, E)  # uneven; E: no expert's
direction = jax.random.normal(keys[5], (T * k, D), jnp.bfloat16)

def found(experts):
    def loss(x, w):
        y = dropless(x, slots, w, ffn="swiglu", experts=experts)
        return (y * direction).astype(jnp.float32).sum(), y
    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(x, w)

def near(a, b):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    assert np.abs(a - b).max() <= 0.03 * np.abs(b).max(), (np.abs(a - b).max(), np.abs(b).max())

jax.tree.map(near, found("grouped"), found("loop"))
"""


@pytest.mark.gpu
@pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="no NVIDIA GPU is attached")
def test_on_a_hopper_gpu_the_kernels_have_the_loop_s_values_and_gradients():
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    done = subprocess.run([sys.executable, "-c", ON_A_GPU], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# The choice.

QWEN = preset("qwen3-30b-a3b")


@pytest.mark.parametrize(
    ("config", "chip", "precision", "tensor", "why"),
    [
        (QWEN, HOPPER, "bf16", 1, None),
        (QWEN, HOPPER, "bf16", 4, None),
        (QWEN, HOPPER, "bf16", 8, "multiplies sides of 64s, and here they are 2,048 and 96"),
        (QWEN, HOPPER, "fp8", 1, "multiplies in 16 bit"),
        (QWEN, HOPPER, "f32", 1, "multiplies in 16 bit"),
        (QWEN, Chip("gpu", (10, 0)), "bf16", 1, "needs a Hopper GPU"),
        (QWEN, Chip("gpu", (8, 0)), "bf16", 1, "needs a Hopper GPU"),
        (QWEN, Chip("gpu"), "bf16", 1, "needs a Hopper GPU"),  # AMD's
        (QWEN, Chip("tpu"), "bf16", 1, "needs a Hopper GPU"),
        (preset("qwen3-30b-a3b", {"capacity_factor": "1.25"}), HOPPER, "bf16", 1, "needs dropless experts"),
        (preset("llama3-8b"), HOPPER, "bf16", 1, "needs dropless experts"),
    ],
)
def test_the_kernels_are_taken_where_they_are_asked_for_and_refused_where_they_cannot(
    config: ModelConfig, chip, precision, tensor, why
):
    where: dict[str, Any] = {"chip": chip, "precision": precision, "tensor": tensor}
    got, because = choose("loop", config, **where)
    assert got == "loop"
    assert because == (f"loop: grouped {why}" if why else "loop: --experts=grouped is not proven on hardware yet")
    if not why:
        assert choose("grouped", config, **where) == ("grouped", "grouped: asked for")
    else:
        with pytest.raises(RequestError, match=f"^--experts=grouped {why}; nearest: --experts=loop$"):
            choose("grouped", config, **where)
