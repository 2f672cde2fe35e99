"""Split over devices equals whole; every device meets as many keys; no pair of blocks is missing or met twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer.attention import attend, dot
from transformer.context import over_context, places_of
from transformer.masks import Causal, Chunked, Everything, Prefix, Segments, Window
from transformer.placement import OnMesh
from transformer.positions import Alibi, Relative
from transformer.sharding import Layout, context_order, make_mesh


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_the_order_has_every_place_once_and_a_part_its_two_chunks(parts):
    order = context_order(48, parts)
    assert sorted(order.tolist()) == list(range(48))
    if parts > 1:
        first = order.reshape(parts, 2, -1)[:, :, 0]
        assert (first[:, 0] + first[:, 1] + 48 // (2 * parts) == 48).all()


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    C=st.sampled_from([2, 3, 4]),
    blocks=st.integers(1, 3),
    ring=st.booleans(),
    mask=st.sampled_from([Everything(), Causal(), Causal() & Window(5), Chunked(8), Causal() & Chunked(6)]),
)
def test_rounds_meet_every_visible_pair_of_places_once_and_evenly(C, blocks, ring, mask):
    """Places by brute force, of all devices and rounds together."""
    size, L = 2, 2 * C * 2 * blocks
    found = places_of(mask, L, L, C, sizes=(size, size), ring=ring)
    assert found.queries.shape == (C, L // C)
    assert found.keys.shape == ((C, C, L // C) if ring else (C, 1, L))
    met = np.zeros((L, L), int)
    for device in range(C):
        for keys, pairs in zip(found.keys[device], found.pairs[device], strict=True):
            for i, j in pairs[pairs[:, 0] >= 0]:
                queries = found.queries[device][i * size : (i + 1) * size]
                met[np.ix_(queries, keys[j * size : (j + 1) * size])] += 1
    assert met.max() == 1
    seen = np.asarray(mask(jnp.arange(L), jnp.arange(L))[0])
    assert (met[seen] == 1).all()
    if mask == Causal():  # of L (L + size) / 2 pairs of places in visible blocks every device has its even part
        work = [(found.pairs[device][..., 0] >= 0).sum() for device in range(C)]
        assert set(work) == {L // size * (L // size + 1) // 2 // C}


B, L, K, G, H = 2, 24, 4, 2, 6
IDS = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 3, (B, L)), axis=1), jnp.int32)
TABLE = jnp.asarray(np.random.default_rng(1).normal(size=(8, K, G)), jnp.float32)
CASES = {
    "causal": (Causal(), {}),
    "all": (Everything(), {}),
    "window": (Causal() & Window(5), {"cap": 2.0}),
    "packed": (Causal() & Segments(IDS, IDS), {"sinks": jnp.asarray(np.linspace(-1, 1, 8).reshape(K, G), jnp.float32)}),
    "blind": (Segments(IDS, IDS), {}),  # padding sees nothing
    "prefix": (Causal() | Prefix(jnp.asarray([3, 9])), {"bias": Alibi(K, G)}),
    "relative": (Everything(), {"bias": Relative(TABLE, both_sides=True, max_distance=16)}),
}


@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
@pytest.mark.parametrize("name", CASES)
def test_split_attention_and_its_gradients_equal_the_whole(name, ring, eight_devices):
    mask, pieces = CASES[name]
    pieces = {"bias": None, "cap": None, "sinks": None} | pieces
    shard = OnMesh(make_mesh(Layout(data=1, context=4, tensor=2), eight_devices), ring=ring)
    rng = np.random.default_rng(2)
    q, k, v, d = (
        jnp.asarray(rng.normal(size=s), jnp.float32)
        for s in ((B, L, K, G, H), (B, L, K, H), (B, L, K, 5), (B, L, K, G, 5))
    )
    order = context_order(L, 4)

    def pieces_of(learned):
        bias = pieces["bias"]
        if isinstance(bias, Relative):
            bias = Relative(learned["table"], both_sides=True, max_distance=16)
        return {"bias": bias, "cap": pieces["cap"], "sinks": learned.get("sinks")}

    def whole(q, k, v, learned):
        return (attend(q, k, v, mask, scale=0.4, **pieces_of(learned)) * d).sum()

    def split(q, k, v, learned):
        # As batches are: whatever a mask holds of positions is in the order that devices have them.
        ordered = jax.tree.map(lambda a: a[:, order] if a.ndim == 2 else a, mask)
        out = over_context(
            q[:, order], k[:, order], v[:, order], ordered, scale=0.4, score=dot, shard=shard, block=2,
            **pieces_of(learned),
        )  # fmt: skip
        return (out * d[:, order]).sum()

    learned = {"sinks": pieces["sinks"]} if pieces["sinks"] is not None else {}
    learned |= {"table": TABLE} if name == "relative" else {}
    got, want = (jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2, 3)))(q, k, v, learned) for f in (split, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), got, want)


def test_a_ring_sends_and_a_gather_gathers(eight_devices):
    """What crosses: keys and values once around; or all of them, once."""
    x = jnp.zeros((B, L, K, H))

    def text(ring):
        shard = OnMesh(make_mesh(Layout(context=8), eight_devices), ring=ring)

        def read(q, k, v):
            return over_context(
                q[:, :, :, None], k, v, Causal(), scale=1.0, score=dot, bias=None, cap=None, sinks=None, shard=shard
            )

        places = shard.activation
        return (
            jax.jit(lambda x: read(*(places(x, "batch", "length", "kv_heads", "head"),) * 3))
            .lower(x[:, :16])
            .compile()
            .as_text()
        )

    assert "collective-permute" in text(ring=True)
    assert "collective-permute" not in text(ring=False)
    assert "all-gather" in text(ring=False)
