"""Every mask against a loop over places, the algebra of & and |, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer.attention import Context, attend, attention, attention_params
from transformer.config import ModelConfig
from transformer.errors import RequestError
from transformer.masks import (
    Both,
    Causal,
    Chunked,
    Either,
    Everything,
    Mask,
    Prefix,
    Segments,
    Window,
    check,
    padding,
    parts,
)
from transformer.models import Transformer, apply, model_params
from transformer.params import map_params
from transformer.placement import UNSHARDED

pytestmark = pytest.mark.usefixtures("strict_dtypes")

B, L, S = 3, 5, 7
few = settings(max_examples=20, deadline=None, derandomize=True)


def whole(mask: Mask) -> np.ndarray:
    """The mask of all places, for every sequence of the batch."""
    return np.broadcast_to(np.asarray(mask(jnp.arange(L), jnp.arange(S))), (B, L, S))


ids = st.integers(0, 3)
sizes = st.integers(1, 8)
lengths = st.lists(st.integers(0, S), min_size=B, max_size=B).map(lambda t: Prefix(jnp.asarray(t, jnp.int32)))
rows = st.tuples(
    st.lists(ids, min_size=B * L, max_size=B * L).map(lambda t: jnp.asarray(t, jnp.int32).reshape(B, L)),
    st.lists(ids, min_size=B * S, max_size=B * S).map(lambda t: jnp.asarray(t, jnp.int32).reshape(B, S)),
)
simple = st.one_of(
    st.just(Everything()), st.just(Causal()), sizes.map(Window), sizes.map(Chunked), lengths, rows.map(lambda t: Segments(*t))
)  # fmt: skip
masks = st.recursive(
    simple, lambda m: st.builds(Mask.__and__, m, m) | st.builds(Mask.__or__, m, m), max_leaves=4
)  # fmt: skip


def sees(mask: Mask, b: int, query: int, key: int) -> bool:
    """Whether a query of sequence b sees a key, in words of its own."""
    match mask:
        case Everything():
            return True
        case Causal():
            return key <= query
        case Window(size):
            return query - size < key < query + size
        case Chunked(size):
            return any({query, key} <= set(range(start, start + size)) for start in range(0, L + S, size))
        case Prefix(lengths):
            return key < int(lengths[b])
        case Segments(queries, keys):
            return int(queries[b, query]) == int(keys[b, key]) != 0
        case Both(first, second):
            return sees(first, b, query, key) and sees(second, b, query, key)
        case Either(first, second):
            return sees(first, b, query, key) or sees(second, b, query, key)
    raise AssertionError(mask)


@pytest.mark.smoke
def test_patterns_listed():
    def listed(mask: Mask) -> list[str]:
        return ["".join(str(int(seen)) for seen in row) for row in mask(jnp.arange(4), jnp.arange(4))[0]]

    assert listed(Everything()) == ["1111", "1111", "1111", "1111"]
    assert listed(Causal()) == ["1000", "1100", "1110", "1111"]
    assert listed(Causal() & Window(2)) == ["1000", "1100", "0110", "0011"]
    assert listed(Causal() & Window(1)) == ["1000", "0100", "0010", "0001"]
    assert listed(Window(2)) == ["1100", "1110", "0111", "0011"]
    assert listed(Chunked(2)) == ["1100", "1100", "0011", "0011"]
    assert listed(Chunked(3)) == ["1110", "1110", "1110", "0001"]
    assert listed(Causal() | Prefix(jnp.asarray([2]))) == ["1100", "1100", "1110", "1111"]
    packed = jnp.asarray([[1, 1, 2, 0]])
    assert listed(Segments(packed, packed)) == ["1100", "1100", "0010", "0000"]


@few
@given(masks)
def test_every_mask_is_its_formula_at_every_place(mask):
    want = [[[sees(mask, b, query, key) for key in range(S)] for query in range(L)] for b in range(B)]
    np.testing.assert_array_equal(whole(mask), np.asarray(want))


@few
@given(masks, masks)
def test_and_is_both_and_or_is_either(first, second):
    np.testing.assert_array_equal(whole(first & second), whole(first) & whole(second))
    np.testing.assert_array_equal(whole(first | second), whole(first) | whole(second))


@few
@given(masks, st.lists(st.integers(0, L - 1), min_size=3, max_size=3), st.lists(st.integers(0, S - 1), min_size=4, max_size=4))  # fmt: skip
def test_asking_for_some_places_is_indexing_the_whole(mask, queries, keys):
    got = mask(jnp.asarray(queries), jnp.asarray(keys))
    want = whole(mask)[:, queries][:, :, keys]
    assert got.shape[0] in (1, B)  # what does not depend on the sequence is not repeated for each
    np.testing.assert_array_equal(np.broadcast_to(got, want.shape), want)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(masks)
def test_masks_pass_through_jit_and_loops_as_trees(mask):
    places = jnp.arange(L), jnp.arange(S)
    np.testing.assert_array_equal(jax.jit(lambda m: m(*places))(mask), mask(*places))
    carried, each = jax.lax.scan(lambda m, _: (m, m(*places)), mask, None, length=2)
    np.testing.assert_array_equal(each[1], mask(*places))
    assert jax.tree.structure(carried) == jax.tree.structure(mask)


def test_sizes_are_of_the_program_and_lengths_are_data():
    """Another window is another program, another prefix is not."""
    calls = []

    @jax.jit
    def ask(mask):
        calls.append(mask)
        return mask(jnp.arange(L), jnp.arange(S))

    for mask in (Window(2), Window(2), Window(3), Prefix(jnp.asarray([1, 2, 3])), Prefix(jnp.asarray([3, 2, 1]))):
        np.testing.assert_array_equal(ask(mask), mask(jnp.arange(L), jnp.arange(S)))
    assert [type(mask) for mask in calls] == [Window, Window, Prefix]


def test_parts_are_what_and_joined_in_order():
    prefix = Causal() | Prefix(jnp.asarray([1, 2, 3]))
    assert parts(Causal() & Window(4)) == (Causal(), Window(4))
    assert parts((Causal() & Window(4)) & (Chunked(2) & Window(3))) == (Causal(), Window(4), Chunked(2), Window(3))
    assert parts(prefix & Window(2)) == (prefix, Window(2))
    assert parts(Everything()) == (Everything(),)
    assert Everything() & Causal() == Causal() & Everything() == Causal()  # nothing to look through


def test_padding_is_seen_by_nobody_and_hides_nothing_else():
    valid = np.random.default_rng(0).random((B, S)) < 0.6
    np.testing.assert_array_equal(whole(padding(jnp.asarray(valid), L)), np.repeat(valid[:, None], L, axis=1))


SIZES = {"batch": B, "n_queries": L, "n_keys": S}
GOOD = Segments(jnp.ones((B, L), jnp.int32), jnp.ones((B, S), jnp.int32))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Prefix(jnp.zeros(2, jnp.int32)), "mask Prefix: lengths has shape (2,), expected (3,)"),
        (dataclasses.replace(GOOD, queries=GOOD.keys), "mask Segments: queries has shape (3, 7), expected (3, 5)"),
        (dataclasses.replace(GOOD, keys=GOOD.queries), "mask Segments: keys has shape (3, 5), expected (3, 7)"),
        (Segments(GOOD.queries[:2], GOOD.keys[:2]), "mask Segments: queries has shape (2, 5), expected (3, 5)"),
    ],
)
def test_arrays_of_another_shape_are_refused_naming_both(mask, message):
    for joined in (
        mask,
        Causal() & mask,
        mask & Window(2),
        mask | Causal(),
        Window(1) & (GOOD & Causal() | (GOOD & mask)),
    ):
        with pytest.raises(RequestError) as caught:
            check(joined, **SIZES)
        assert str(caught.value) == message


@few
@given(masks)
def test_arrays_of_the_right_shape_pass(mask):
    check(mask, **SIZES)


TINY = ModelConfig(n_layers=1, d_model=6, n_heads=2, n_kv_heads=1, d_head=2, d_ff=4, vocab_size=8, max_len=8)


@pytest.mark.smoke
def test_attention_refuses_a_mask_of_another_shape_before_anything_compiles():
    def abstract(tree):
        return map_params(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), tree)

    x = jax.ShapeDtypeStruct((B, L, 6), jnp.float32)

    def call(params, x):
        context = Context(jnp.arange(L)[None])
        return attention(
            params, x, GOOD, context, kind=TINY.kind(0), cross=False, config=TINY, attend=attend, shard=UNSHARDED
        )  # fmt: skip

    with pytest.raises(RequestError, match=r"keys has shape \(3, 7\), expected \(3, 5\)"):
        jax.eval_shape(call, abstract(attention_params(TINY)), x)
    prefix = dataclasses.replace(TINY, prefix=True)
    batch = {"inputs": jnp.zeros((B, L), jnp.int32), "prefix": jnp.zeros(2, jnp.int32)}
    with pytest.raises(RequestError, match=r"mask Prefix: lengths has shape \(2,\), expected \(3,\)"):
        jax.eval_shape(lambda p: apply(Transformer(prefix), p, batch), abstract(model_params(prefix)))
