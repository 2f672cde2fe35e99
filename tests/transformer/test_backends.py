"""Every backend computes what `attend` computes; what kernels refuse; what compilers make of them."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from experiments.forecast.topology import devices_of
from experiments.hardware import load
from transformer.attention import additive, attend, dot
from transformer.backends import attend_by
from transformer.blockwise import blockwise, visible_blocks
from transformer.errors import RequestError
from transformer.kernels import cudnn, splash
from transformer.masks import Causal, Chunked, Everything, Mask, Prefix, Segments, Window, padding
from transformer.placement import UNSHARDED, OnMesh
from transformer.positions import Alibi, Relative
from transformer.sharding import ACTIVATION_RULES, Layout, make_mesh, spec

few = settings(max_examples=12, deadline=None, derandomize=True)


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def texts(batch: int, length: int) -> jax.Array:
    """Ids of three packed texts, the last fifth padding."""
    ids = np.sort(np.random.default_rng(length).integers(1, 4, (batch, length)), axis=1)
    ids[:, length - length // 5 :] = 0
    return jnp.asarray(ids, jnp.int32)


def masks(batch: int, length: int) -> dict[str, Mask]:
    """Of self-attention. With padding in front, the first queries see no key."""
    ids = texts(batch, length)
    valid = jnp.arange(length)[None] >= jnp.asarray([[length // 4]] * (batch - 1) + [[0]])
    return {
        "all": Everything(),
        "causal": Causal(),
        "window": Causal() & Window(length // 3),
        "both sides": Window(length // 3),
        "chunks": Causal() & Chunked(length // 3),
        "chunks, both sides": Chunked(length // 3),
        "prefix": Causal() | Prefix(jnp.arange(1, batch + 1) * 2),
        "texts": Causal() & Segments(ids, ids),
        "padding": Causal() & padding(valid, length),
        "texts in a window": Causal() & Window(length // 3) & Segments(ids, ids) & padding(valid, length),
    }


SELF = tuple(masks(1, 8))


def gradients(function: Any, inputs: dict[str, jax.Array], d_out: jax.Array) -> dict[str, jax.Array]:
    """The result and the gradient of every input that there is."""

    @jax.jit
    def run(inputs, d_out):
        out, pull = jax.vjp(lambda inputs: function(**inputs), inputs)
        return {"out": out, **pull(d_out.astype(out.dtype))[0]}

    return run(inputs, d_out)


def assert_same(got: Any, want: Any, inputs: dict[str, jax.Array], *, tolerance: float = 2e-5) -> None:
    """Relative to the largest number of each tensor."""
    v = inputs["v"]
    d_out = random(*inputs["q"].shape[:-1], v.shape[-1], seed=7)
    got, want = gradients(got, inputs, d_out), gradients(want, inputs, d_out)
    for name, x in want.items():
        assert got[name].dtype == x.dtype, name
        error = jnp.abs(got[name].astype(jnp.float32) - x.astype(jnp.float32)).max() / jnp.abs(x).max().clip(1e-3)
        assert error < tolerance, (name, float(error))


def tensors(b: int, n_l: int, n_s: int, k: int, g: int, h: int, v: int) -> dict[str, jax.Array]:
    return {"q": random(b, n_l, k, g, h), "k": random(b, n_s, k, h, seed=1), "v": random(b, n_s, k, v, seed=2)}


@few
@given(
    shape=st.sampled_from([(2, 13, 3, 2, 5, 7), (1, 17, 2, 1, 7, 3), (2, 8, 1, 3, 4, 4)]),
    kind=st.sampled_from(SELF),
    block=st.sampled_from([3, 8, 64]),
    cap=st.sampled_from([None, 1.5]),
    bias=st.sampled_from([None, "relative", "alibi"]),
    with_sinks=st.booleans(),
    with_additive=st.booleans(),
)
def test_blockwise_equals_attend_forward_and_in_every_gradient(
    shape, kind, block, cap, bias, with_sinks, with_additive
):
    b, length, k, g, h, v = shape
    inputs = tensors(b, length, length, k, g, h, v)
    inputs |= {"table": random(8, k, g)} if bias == "relative" else {}
    inputs |= {"sinks": random(k, g)} if with_sinks else {}
    inputs |= {"w": random(k, g, h)} if with_additive else {}

    def by(function, *, q, k, v, table=None, w=None, sinks=None, **more):
        added = Alibi(k.shape[2], q.shape[3]) if bias == "alibi" else None
        added = Relative(table, both_sides=False, max_distance=16) if table is not None else added
        score = dot if w is None else additive(w)
        mask = masks(b, length)[kind]
        return function(q, k, v, mask, scale=0.4, score=score, bias=added, cap=cap, sinks=sinks, **more)

    assert_same(partial(by, blockwise, block=block), partial(by, attend), inputs)


@pytest.mark.parametrize(("n_l", "n_s"), [(5, 13), (13, 5)])
def test_blockwise_reads_a_memory_of_another_length(n_l, n_s):
    inputs = tensors(2, n_l, n_s, 2, 2, 4, 4)
    mask = Segments(
        jnp.ones((2, n_l), jnp.int32), (jnp.arange(n_s)[None] < jnp.asarray([[3], [n_s]])).astype(jnp.int32)
    )
    by = {"mask": mask, "scale": 0.5}
    assert_same(partial(blockwise, block=4, **by), partial(attend, **by), inputs)


def test_blockwise_in_bf16_is_as_close_as_attend():
    inputs = tensors(2, 64, 64, 2, 2, 16, 16)
    d_out = random(2, 64, 2, 2, 16, seed=7)
    want = gradients(partial(attend, mask=Causal(), scale=0.25), inputs, d_out)
    narrow = {name: x.astype(jnp.bfloat16) for name, x in inputs.items()}
    for function in (attend, partial(blockwise, block=16)):
        got = gradients(partial(function, mask=Causal(), scale=0.25), narrow, d_out)
        for name, x in want.items():
            assert got[name].dtype == jnp.bfloat16
            np.testing.assert_allclose(got[name].astype(jnp.float32), x, atol=2**-6 * float(jnp.abs(x).max()))


@pytest.mark.parametrize("derive", [False, True], ids=["forward", "gradient"])
def test_memory_of_blockwise_is_linear_in_length(derive):
    def temporary(function: Any, length: int) -> int:
        shapes = [jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in ((1, length, 1, 2, 16), *[(1, length, 1, 16)] * 2)]

        def result(q, k, v, ids):
            return function(q, k, v, Causal() & Segments(ids, ids), scale=0.25).astype(jnp.float32).sum()

        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        run = jax.jit(jax.grad(result, argnums=(0, 1, 2)) if derive else result)
        return run.lower(*shapes, ids).compile().memory_analysis().temp_size_in_bytes

    small, large = (temporary(partial(blockwise, block=64), n) for n in (1024, 2048))
    assert large < 2.1 * small
    assert temporary(attend, 2048) > 20 * large


@few
@given(
    kind=st.sampled_from([k for k in SELF if k not in ("prefix", "texts", "padding", "texts in a window")]),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    length=st.integers(8, 20),
)
def test_visible_blocks_are_those_with_a_pair_that_sees(kind, sizes, length):
    mask = masks(1, length)[kind]
    n_l, n_s = (-(-length // size) for size in sizes)
    seen = np.asarray(mask(jnp.arange(n_l * sizes[0]), jnp.arange(n_s * sizes[1])))[0]
    blocks = seen.reshape(n_l, sizes[0], n_s, sizes[1]).any((1, 3))
    assert visible_blocks(mask, n_l, sizes[0], n_s, sizes[1]).tolist() == np.argwhere(blocks).tolist()


def test_blocks_that_arrays_or_either_leave_open():
    causal, prefix = Causal(), Prefix(jnp.asarray([3]))
    assert len(visible_blocks(causal & Segments(texts(1, 8), texts(1, 8)), 4, 2, 4, 2)) == 10
    assert len(visible_blocks(causal | prefix, 4, 2, 4, 2)) == 16
    assert len(visible_blocks(causal | Chunked(4), 4, 2, 4, 2)) == 12


@pytest.mark.parametrize(
    ("kind", "bias", "length"),
    [
        *[("all", None, 13), ("causal", None, 16), ("window", None, 13), ("both sides", None, 16)],
        *[("prefix", None, 13), ("padding", None, 16), ("all", "relative", 13), ("window", "relative", 16)],
        ("texts", "relative", 13),
    ],
)
def test_what_cudnn_is_asked_for_is_attend(monkeypatch, kind, bias, length):
    """JAX's own implementation answers in its place, for it takes the same arguments."""
    asked: dict[str, Any] = {}
    answer = jax.nn.dot_product_attention

    def stand_in(*args, implementation, **kwargs):
        asked.update(kwargs, heads=[x.shape[-1] for x in args])
        return answer(*args, **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    inputs = tensors(2, length, length, 3, 2, 5, 7) | ({"table": random(8, 3, 2)} if bias else {})
    mask = masks(2, length)[kind]

    def by(function, *, q, k, v, table=None):
        added = Relative(table, both_sides=True, max_distance=8) if table is not None else None
        return function(q, k, v, mask, scale=0.3, bias=added)

    assert_same(partial(by, cudnn), partial(by, attend), inputs)
    assert asked["heads"] == [8, 8, 8]
    assert asked["is_causal"] == (kind not in ("all", "both sides", "prefix"))
    assert asked["local_window_size"] == ((length // 3 - 1, 0) if kind == "window" and not bias else None)
    dense = bool(bias) or kind not in ("all", "causal", "window")
    assert ("mask" in asked or "bias" in asked) == dense
    assert all(not dense or n % 2 == 0 for name in ("mask", "bias") if name in asked for n in asked[name].shape[2:])


@pytest.mark.parametrize(
    ("kind", "length", "cap", "sinks"),
    [
        ("causal", 130, None, False),
        ("window", 256, 2.0, True),
        ("chunks", 256, None, False),
        ("chunks, both sides", 128, None, False),
        ("both sides", 130, None, False),
        ("texts in a window", 200, None, False),
    ],
)
def test_splash_equals_attend(kind, length, cap, sinks):
    """Interpreted, for it is a TPU's. Two kv heads of two queries each; values are smaller than keys."""
    inputs = tensors(2, length, length, 2, 2, 16, 8) | ({"sinks": random(2, 2)} if sinks else {})
    by = {"mask": masks(2, length)[kind], "scale": 0.3, "cap": cap}
    assert_same(partial(splash, interpret=True, **by), partial(attend, **by), inputs)


def collectives(text: str) -> set[str]:
    """By which devices talk to each other in a compiled program."""
    return set(re.findall(r" ((?:all-|collective-|reduce-scatter)[\w-]*)\(", text))


@pytest.mark.parametrize("backend", ["blockwise", "splash"])
def test_sharded_equals_unsharded(eight_devices, backend):
    """Heads and sequences are whole on a device, so no device talks to another."""
    shard = OnMesh(make_mesh(Layout(data=2, fsdp=2, tensor=2), eight_devices))
    inputs = tensors(4, 128, 128, 2, 2, 8, 8) | {"sinks": random(2, 2), "ids": texts(4, 128)}
    dims = {
        "q": ("batch", "length", "kv_heads", "group", "head"),
        **dict.fromkeys(("k", "v"), ("batch", "length", "kv_heads", "head")),
        "sinks": ("kv_heads", "group"),
        "ids": ("batch", "length"),
    }
    placed = {
        name: jax.device_put(x, NamedSharding(shard.mesh, spec(dims[name], ACTIVATION_RULES)))
        for name, x in inputs.items()
    }

    def run(by, *, q, k, v, sinks, ids):
        return by(q, k, v, Causal() & Segments(ids, ids), scale=0.3, sinks=sinks)

    by = partial(attend_by, "blockwise", shard=shard)
    by = by if backend == "blockwise" else partial(splash, shard=shard, interpret=True)
    compiled = jax.jit(partial(run, by)).lower(**placed).compile()
    assert not collectives(compiled.as_text())
    got = compiled(**placed)
    assert got.sharding.is_equivalent_to(placed["q"].sharding, got.ndim)
    np.testing.assert_allclose(got, run(attend, **inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "more", "message"),
    [
        ("cudnn", {"cap": 2.0}, "cudnn has no soft cap"),
        ("cudnn", {"sinks": jnp.zeros((2, 2))}, "cudnn has no sinks"),
        ("cudnn", {"score": lambda q, k: dot(q, k)}, "cudnn has no such scores"),
        ("splash", {"score": lambda q, k: dot(q, k)}, "splash has no such scores"),
        ("splash", {"bias": Alibi(2, 2)}, "splash has no bias"),
        ("splash", {"mask": Causal() | Prefix(jnp.asarray([1, 2]))}, "splash has no mask Either"),
    ],
)
def test_kernels_refuse_what_they_lack(backend, more, message):
    with pytest.raises(RequestError, match=f"--attention={message}; nearest: --attention=blockwise"):
        attend_by(backend, **tensors(2, 8, 8, 2, 2, 4, 4), **{"mask": Causal(), "scale": 1.0, **more})


def compiled(device: str, layout: Layout, by: Any, *, table: bool = False) -> str:
    """The program of forward pass and gradients on absent devices: 4 sequences of 512, 2 kv heads of 2 queries."""
    mesh = make_mesh(layout, devices_of(load().device(device), Layout(data=max(layout.n_devices, 4))))
    shard = OnMesh(mesh) if layout.n_devices > 1 else UNSHARDED

    def place(shape: tuple[int, ...], *dims: str, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec(dims, ACTIVATION_RULES)))

    heads = ("batch", "length", "kv_heads")
    inputs = {
        "q": place((4, 512, 2, 2, 64), *heads, "group", "head"),
        "k": place((4, 512, 2, 64), *heads, "head"),
        "v": place((4, 512, 2, 64), *heads, "head"),
    }
    inputs |= {"table": place((32, 2, 2), "channel", "kv_heads", "group")} if table else {}
    ids = place((4, 512), "batch", "length", dtype=jnp.int32)
    loss = jax.grad(lambda x, ids: by(**x, ids=ids, shard=shard).astype(jnp.float32).sum())
    return jax.jit(loss).lower(inputs, ids).compile().as_text()


@pytest.mark.deviceless
@pytest.mark.parametrize("layout", [Layout(), Layout(fsdp=2, tensor=2)], ids=["one", "four"])
def test_cudnn_compiles_for_h100(layout):
    def by(q, k, v, ids, shard, table=None):
        if table is None:
            return cudnn(q, k, v, Causal() & Window(100), scale=0.1, shard=shard)
        added = Relative(table, both_sides=False, max_distance=128)
        return cudnn(q, k, v, Causal() & Segments(ids, ids), scale=0.1, bias=added, shard=shard)

    plain = compiled("h100-sxm", layout, by)
    assert set(re.findall(r"__cudnn\$\w+", plain)) == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    assert '"sliding_window_length":100' in plain.replace(" ", "")
    assert not collectives(plain)
    biased = compiled("h100-sxm", layout, by, table=True)
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in biased
    assert collectives(biased) <= {"all-reduce", "all-reduce-start", "all-reduce-done"}  # the table's gradient


@pytest.mark.deviceless
@pytest.mark.parametrize("layout", [Layout(), Layout(fsdp=2, tensor=2)], ids=["one", "four"])
def test_splash_compiles_for_v5p(layout):
    def by(q, k, v, ids, shard):
        return splash(q, k, v, Causal() & Window(300) & Segments(ids, ids), scale=0.1, cap=30.0, shard=shard)

    text = compiled("tpu-v5p", layout, by)
    assert len(re.findall(r'custom_call_target="tpu_custom_call"', text)) == 3  # forward, dq, dkv
    assert not collectives(text)
