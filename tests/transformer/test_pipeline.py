"""The schedule by hand; what a stage keeps; the bubble as published."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer.passes import passes_of
from transformer.pipeline import Model, Pipeline, by_stage, gradients, in_order
from transformer.placement import UNSHARDED

pipes = st.builds(
    lambda stages, repeats, groups, extra, missing: Pipeline(
        stages, repeats, stages * groups + (extra if repeats == 1 else 0), 2 * stages * repeats - missing
    ),
    st.integers(2, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3), st.integers(0, 2),
)  # fmt: skip


def test_two_stages_of_two_parts_by_hand():
    """Microbatches 0 and 1 pass parts 0 and 1 of both stages, then 2 and 3. Backward the parts in turn."""
    pipe = Pipeline(stages=2, repeats=2, microbatches=4, layers=4)
    forward = [tuple(int(i) for i in pipe.at(jnp.int32(n))) for n in range(8)]
    assert forward == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (3, 0), (2, 1), (3, 1)]
    backward = [tuple(int(i) for i in pipe.at(jnp.int32(n), backward=True)) for n in range(8)]
    assert backward == [(0, 1), (1, 1), (0, 0), (1, 0), (2, 1), (3, 1), (2, 0), (3, 0)]
    assert (pipe.parts, pipe.ticks, pipe.kept) == (4, 9, 7)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(pipes)
def test_every_part_meets_every_microbatch_in_order_and_what_is_kept_suffices(pipe):
    """Forward a part follows the one before by one tick; backward the one after; and nothing is overwritten that the
    backward pass still needs."""
    S, v, M, _ = pipe
    done: dict[tuple[int, int, int], int] = {}
    back: dict[tuple[int, int, int], int] = {}
    for s in range(S):
        for n in range(v * M):
            m, part = (int(i) for i in pipe.at(jnp.int32(n)))
            assert int(pipe.number(jnp.int32(m), jnp.int32(part))) == n
            done[m, part, s] = n + s
            m, part = (int(i) for i in pipe.at(jnp.int32(n), backward=True))
            back[m, part, s] = pipe.parts - 1 + n + S - 1 - s
    assert len(done) == len(back) == v * M * S
    for (m, part, s), tick in done.items():
        before = (m, part, s - 1) if s else (m, part - 1, S - 1)
        if before[1] >= 0:
            assert done[before] == tick - 1
            assert back[before] == back[m, part, s] + 1
        assert back[m, part, s] >= tick
    for s in range(S):  # a slot is written again only after it was read
        slots: dict[int, int] = {}
        for (m, part, stage), tick in sorted(done.items(), key=lambda item: item[1]):
            if stage == s:
                slot = int(pipe.number(jnp.int32(m), jnp.int32(part))) % pipe.kept
                assert slots.get(slot, -1) < tick
                slots[slot] = back[m, part, s]
    assert max(done.values()) == pipe.ticks - 1
    assert max(back.values()) == pipe.ticks + pipe.parts - 2


def test_bubble_as_published():
    """Narayanan et al. 2021, sec. 2.2: (p - 1) / m, and by v less where parts are interleaved. Ticks agree."""
    assert Pipeline(8, 1, 64, 8).bubble == 7 / 64
    assert Pipeline(8, 4, 64, 32).bubble == 7 / 256
    pipe = Pipeline(12, 2, 48, 24)
    assert (pipe.ticks - 2 * 48) / (2 * 48) == pipe.bubble


def test_fewer_activations_than_gpipe_however_many_microbatches():
    """GPipe keeps every microbatch of every part."""
    assert [Pipeline(4, 1, M, 4).kept for M in (1, 4, 16, 256)] == [1, 4, 7, 7]
    assert [Pipeline(4, 2, M, 8).kept for M in (4, 16, 256)] == [8, 15, 15]


def test_what_is_kept_of_a_layer_is_its_input_and_no_weight():
    """Of a layer that forgets everything: the stream. Of one that keeps its products: those too."""
    p, x = {"w": jnp.ones((4, 8)), "u": jnp.ones((8, 4))}, jnp.ones((2, 3, 4))

    def layer(p, shared, x, row):
        return (x + jnp.tanh(x @ p["w"]) @ p["u"] * row["scale"], jnp.zeros(())), {}

    def kept(policy):
        forgetful = jax.checkpoint(layer, policy=policy) if policy else layer
        return sorted(a.shape for a in passes_of(forgetful, p, None, x, {"scale": jnp.ones(())}).kept)

    assert kept(jax.checkpoint_policies.nothing_saveable) == [(2, 3, 4)]
    assert kept(jax.checkpoint_policies.dots_saveable) == [(2, 3, 4), (2, 3, 8)]
    assert (4, 8) not in kept(None)
    assert (8, 4) not in kept(None)


def test_what_only_places_decide_is_made_again():
    """A mask or a bias would be as large as scores are, for every microbatch on its way."""
    p, x = {"w": jnp.ones((4, 4))}, jnp.ones((2, 3, 4))
    row = {"at": jnp.arange(3.0)}

    def layer(p, shared, x, row):
        bias = jnp.sin(shared["slope"] * row["at"][:, None] - row["at"][None])
        return (jnp.einsum("ls,bsd->bld", bias, x @ p["w"]), jnp.zeros(())), {}

    passes = passes_of(layer, p, {"slope": jnp.ones(())}, x, row)
    assert [a.shape for a in passes.kept] == [(2, 3, 4)] * 2  # x, and x w for the slope: no bias [3, 3]
    y, kept, _ = passes.forward(p, {"slope": jnp.ones(())}, x, row)
    found = passes.backward(kept, p, {"slope": jnp.ones(())}, row, y, jnp.zeros(()))
    want = jax.vjp(lambda p, s, x: layer(p, s, x, row)[0][0], p, {"slope": jnp.ones(())}, x)[1](y)
    jax.tree.map(np.testing.assert_allclose, found, want)


@settings(deadline=None, max_examples=12, derandomize=True)
@given(pipes)
def test_gradients_are_those_of_the_layers_one_after_another(pipe):
    """Layers that add to the loss and leave something behind, a bias that all share, rows that differ; and up to two
    layers fewer than the parts have room for."""
    _, _, M, n_layers = pipe
    rng = np.random.default_rng(sum(pipe))
    layers = {"w": jnp.asarray(rng.normal(size=(n_layers, 3, 3)), jnp.float32)}
    outer = {name: jnp.asarray(rng.normal(size=3), jnp.float32) for name in ("in", "out", "bias")}
    rows = {"x": jnp.asarray(rng.normal(size=(M, 2, 4)), jnp.float32)}

    def first(outer, row):
        return row["x"][:, :, None] * outer["in"][None, None]

    def layer(p, shared, x, row):
        y = x + jnp.tanh(x @ p["w"] + shared[None, None]) * row["x"].mean()
        return (y, 0.01 * jnp.square(y).mean()), {"seen": y.sum()}

    def last(outer, x, row):
        return (x @ outer["out"] * row["x"]).sum()

    def shared(outer):
        return 2 * outer["bias"]

    def plain(outer, layers):
        total, seen = jnp.zeros(()), jnp.zeros(n_layers)
        for m in range(M):
            row = {"x": rows["x"][m]}
            x = first(outer, row)
            for i in range(n_layers):
                (x, added), left = layer({"w": layers["w"][i]}, shared(outer), x, row)
                total, seen = total + added, seen.at[i].add(left["seen"])
            total = total + last(outer, x, row)
        return total, seen

    def staged(outer, layers):
        fill = {"w": by_stage(layers["w"], pipe)}
        return gradients(Model(first, layer, last, shared), outer, fill, rows, pipe, UNSHARDED)

    loss, d_outer, d_layers, _, left = jax.jit(staged)(outer, layers)
    d_layers, left = jax.tree.map(lambda a: in_order(a, pipe), (d_layers, left))
    (want, seen), (of_outer, of_layers) = jax.jit(jax.value_and_grad(plain, argnums=(0, 1), has_aux=True))(
        outer, layers
    )
    added = want - sum(float(last(outer, _through(first, layer, shared, outer, layers, rows["x"][m]), {"x": rows["x"][m]})) for m in range(M))  # fmt: skip
    np.testing.assert_allclose(loss + added, want, rtol=1e-4, atol=1e-4)  # the loss is without what layers add
    np.testing.assert_allclose(left["seen"], seen, rtol=1e-4, atol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max()),
        (d_outer, d_layers), (of_outer, of_layers),
    )  # fmt: skip


def _through(first, layer, shared, outer, layers, x):
    row = {"x": x}
    x = first(outer, row)
    for w in layers["w"]:
        (x, _), _ = layer({"w": w}, shared(outer), x, row)
    return x
