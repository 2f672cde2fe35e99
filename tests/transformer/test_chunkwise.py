"""A fused kernel over a split sequence: what meets, that its results and gradients join to those of the whole, and what
compilers make of it. Run as a program on a machine with an NVIDIA GPU it holds cuDNN itself against `attend`."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from transformer import cudnn_calls, remat
from transformer.attention import attend
from transformer.backends import attend_by
from transformer.chunkwise import Kernel, attend_chunks, meetings_of
from transformer.errors import RequestError
from transformer.kernels import splash
from transformer.masks import Causal, Chunked, Everything, Mask, Segments, Window
from transformer.placement import OnMesh
from transformer.positions import Alibi
from transformer.sharding import ACTIVATION_RULES, Layout, context_order, make_mesh, spec


@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
@pytest.mark.parametrize("C", [2, 3, 8])
def test_chunks_meet_as_a_causal_mask_has_it_and_evenly(C, ring):
    """By brute force: 1 where a query chunk lies behind a key chunk, 2 at their own places. (The tables have a number
    of pairs for all devices: two at the same places and 2 C - 1 others.)"""
    found = meetings_of(C, causal=True, ring=ring)
    chunks = context_order(2 * C, C).reshape(C, 2)
    met = np.zeros((2 * C, 2 * C), int)
    for d in range(C):
        rounds = [chunks[(d - r) % C] for r in range(C)] if ring else [chunks.reshape(-1)]
        pairs = [(found.same[d], 2, rounds[0]), (found.whole[d], 1, rounds[0])]
        pairs += [(later, 1, keys) for later, keys in zip(found.later[d], rounds[1:], strict=True)]
        for numbers, how, keys in pairs:
            for i, j in numbers:
                met[chunks[d][i], keys[j]] += how
    np.testing.assert_array_equal(met, np.tri(2 * C, k=-1) + 2 * np.eye(2 * C))
    n_whole = found.whole.shape[1] + found.later.shape[1] * found.later.shape[2]
    assert (found.same.shape[1], n_whole) == (2, 2 * C - 1)


def scores(q, k, scale, causal):
    s = jnp.einsum("blnh,bsnh->bnls", q, jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)) * scale
    return jnp.where(jnp.tri(*s.shape[2:], dtype=bool)[None, None], s, -jnp.inf) if causal else s


def forward(q, k, v, *, scale, causal):
    """What cuDNN promises, in plain JAX."""
    s = scores(q, k, scale, causal)
    normalizer = jax.nn.logsumexp(s, axis=-1)
    wide = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
    return jnp.einsum("bnls,bsnh->blnh", jnp.exp(s - normalizer[..., None]), wide), normalizer


def backward(q, k, v, out, normalizer, d_out, *, scale, causal):
    s, pull = jax.vjp(lambda q, k: scores(q, k, scale, causal), q, k)
    p = jnp.exp(s - normalizer[..., None])
    read, pull_v = jax.vjp(lambda v: jnp.repeat(v, q.shape[2] // v.shape[2], axis=2), v)
    d_p = jnp.einsum("blnh,bsnh->bnls", d_out, read)
    expected = jnp.einsum("blnh,blnh->bnl", d_out, out)
    (d_v,) = pull_v(jnp.einsum("bnls,blnh->bsnh", p, d_out))
    return *pull(p * (d_p - expected[..., None])), d_v


def tensors(B: int, L: int, K: int, G: int, H: int, V: int) -> list[Any]:
    """q, k, v, and the gradient of the result."""
    rng = np.random.default_rng(0)
    shapes = (B, L, K, G, H), (B, L, K, H), (B, L, K, V), (B, L, K, G, V)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def assert_split_equals_whole(by: Any, mask: Mask, C: int, given: list[Any], **pieces: Any) -> None:
    """Result and gradients. `by` gets its positions in the order of devices."""
    *inputs, d_out = given
    order = context_order(d_out.shape[1], C)

    def split(*inputs):
        return by(*(x[:, order] for x in inputs), mask, scale=0.4, **pieces)[:, np.argsort(order)]

    def whole(*inputs):
        return attend(*inputs, mask, scale=0.4, **pieces)

    for run in (split, whole):
        out, pull = jax.vjp(jax.jit(run), *inputs)
        if run is split:
            got = out, *pull(d_out)
        else:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, (out, *pull(d_out)))


@pytest.fixture
def stand_in(monkeypatch):
    """In the kernel's place; it notes the sizes of heads that it is asked for."""
    asked: set[int] = set()

    def noted(q, k, v, **pieces):
        asked.update(x.shape[-1] for x in (q, k, v))
        return forward(q, k, v, **pieces)

    monkeypatch.setattr(cudnn_calls, "forward", noted)
    monkeypatch.setattr(cudnn_calls, "backward", backward)
    return asked


@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
@pytest.mark.parametrize("mask", [Causal(), Everything()], ids=["causal", "all"])
@pytest.mark.parametrize("C", [2, 4])
def test_cudnn_over_a_split_sequence_equals_the_whole(C, mask, ring, stand_in, eight_devices):
    """Two queries a kv head, over tensor; values are smaller than keys, and cuDNN has one size, a multiple of 8."""
    shard = OnMesh(make_mesh(Layout(context=C, tensor=2), eight_devices[: 2 * C]), ring=ring)

    def by(*inputs, **pieces):
        return attend_by("cudnn", *inputs, **pieces, shard=shard)

    assert_split_equals_whole(by, mask, C, tensors(2, 24, 2, 2, 6, 5))
    assert stand_in == {8}


def test_a_memory_may_have_another_length(stand_in, eight_devices):
    shard = OnMesh(make_mesh(Layout(context=2), eight_devices[:2]))
    (q, *_, d_out), (_, k, v, _) = tensors(2, 8, 2, 2, 8, 8), tensors(2, 12, 2, 2, 8, 8)
    d_out = jnp.asarray(d_out)
    results = [
        jax.vjp(jax.jit(lambda *x, by=by: by(*x, Everything(), scale=0.4)), q, k, v)
        for by in (lambda *x, **p: attend_by("cudnn", *x, **p, shard=shard), attend)
    ]
    got, want = ((out, *pull(d_out)) for out, pull in results)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize(
    ("mask", "more", "message"),
    [
        (Causal() & Window(4), {}, "no Window over a split sequence"),
        (Causal() & Segments(*[jnp.ones((2, 8), jnp.int32)] * 2), {}, "no Segments over a split sequence"),
        (Causal(), {"bias": Alibi(2, 2)}, "no bias over a split sequence"),
    ],
)
def test_what_cudnn_refuses_over_a_split_sequence(mask, more, message, eight_devices):
    shard = OnMesh(make_mesh(Layout(context=2), eight_devices[:2]))
    q, k, v, _ = tensors(2, 8, 2, 2, 8, 8)
    with pytest.raises(RequestError, match=f"^--attention=cudnn has {message}; nearest: --attention=blockwise$"):
        attend_by("cudnn", q, k, v, mask, scale=1.0, shard=shard, **more)


@pytest.mark.parametrize(
    ("mask", "C", "length"),
    [
        (Causal(), 2, 512),
        (Causal(), 2, 300),  # chunks of 75, each filled up to 128
        (Everything(), 4, 512),
        (Everything(), 2, 300),  # so are keys, which nobody may see
        (Causal() & Window(130), 4, 1024),
        (Causal() & Chunked(200), 2, 512),
    ],
    ids=str,
)
def test_splash_over_a_split_sequence_equals_the_whole(mask, C, length, eight_devices):
    """Interpreted, for it is a TPU's."""
    shard = OnMesh(make_mesh(Layout(context=C, tensor=2), eight_devices[: 2 * C]))
    sinks = jnp.asarray([[0.3, -1.0], [0.0, 2.0]], jnp.float32)

    def by(*inputs, **pieces):
        return splash(*inputs, **pieces, shard=shard, interpret=True)

    assert_split_equals_whole(by, mask, C, tensors(1, length, 2, 2, 16, 8), cap=2.0, sinks=sinks)


@pytest.mark.parametrize(
    ("mask", "ring", "message"),
    [
        (Causal(), True, "no ring over a split sequence"),
        (Window(4), False, "no window or chunks on both sides over a split sequence"),
        (Causal() & Segments(*[jnp.ones((2, 8), jnp.int32)] * 2), False, "no packed texts over a split sequence"),
    ],
)
def test_what_splash_refuses_over_a_split_sequence(mask, ring, message, eight_devices):
    shard = OnMesh(make_mesh(Layout(context=2), eight_devices[:2]), ring=ring)
    q, k, v, _ = tensors(2, 8, 2, 2, 8, 8)
    with pytest.raises(RequestError, match=f"^--attention=splash has {message}; nearest: --attention=blockwise$"):
        attend_by("splash", q, k, v, mask, scale=1.0, shard=shard)


def compiled(device: str, backend: str, layout: Layout, *, kept: str = "none") -> str:
    """The program of a result and its gradients on absent devices: 4 sequences of 8,192, 4 kv heads of 2 queries."""
    from experiments.forecast.topology import devices_of
    from experiments.hardware import load

    devices = devices_of(load().device(device), Layout(data=4))
    mesh = make_mesh(layout, devices[: layout.n_devices])
    shard = OnMesh(mesh, ring=bool(layout.ring))

    def place(shape: tuple[int, ...], *dims: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec(dims, ACTIVATION_RULES)))

    heads = ("batch", "length", "kv_heads")
    q = place((4, 8192, 4, 2, 128), *heads, "group", "head")
    k = place((4, 8192, 4, 128), *heads, "head")

    def attended(q, k, v):
        return attend_by(backend, q, k, v, Causal(), scale=0.1, shard=shard)  # type: ignore[arg-type]

    if kept != "none":
        attended = jax.checkpoint(attended, policy=remat.policy(kept))
    loss = jax.value_and_grad(lambda *x: (attended(*x).astype(jnp.float32) ** 2).sum(), argnums=(0, 1, 2))
    return jax.jit(loss).lower(q, k, k).compile().as_text()


def calls(text: str) -> list[str]:
    """Which kernels of cuDNN stand in a program, F forward and B backward, with their masks."""
    found = re.findall(r'custom_call_target="__cudnn\$fmhaSoftmax(Backward)?".*?"mask_type":\s*"(\w+)"', text)
    return sorted(f"{'B' if back else 'F'} {mask}" for back, mask in found)


@pytest.mark.deviceless
@pytest.mark.parametrize("layout", [Layout(context=2, fsdp=2), Layout(context=2, tensor=2), Layout(context=4)], ids=str)
def test_cudnn_over_a_split_sequence_compiles_for_h100(layout):
    text = compiled("h100-sxm", "cudnn", layout)
    assert calls(text) == ["B CAUSAL", "B NO_MASK", "F CAUSAL", "F NO_MASK"]
    scores = 4 * 8 // (layout.fsdp * layout.tensor) * (8192 // (2 * layout.context)) ** 2  # of one pair of chunks
    shapes = re.findall(r" (?:bf16|f32)\[([\d,]+)\]", text)
    assert max(np.prod([int(n) for n in dims.split(",")]) for dims in shapes) < scores


@pytest.mark.deviceless
def test_a_ring_of_cudnn_compiles_for_h100():
    text = compiled("h100-sxm", "cudnn", Layout(context=4, ring=1))
    assert calls(text) == ["B CAUSAL", *["B NO_MASK"] * 2, "F CAUSAL", *["F NO_MASK"] * 2]
    assert "collective-permute" in text
    assert "all-gather" not in text


@pytest.mark.deviceless
def test_what_is_kept_of_split_attention_is_its_result():
    """Under `full` the kernels run again, under `dots` they do not, and nothing of single calls is stacked."""
    full, dots = (compiled("h100-sxm", "cudnn", Layout(context=2, fsdp=2), kept=kept) for kept in ("full", "dots"))
    assert calls(full).count("F CAUSAL") == 2
    assert calls(dots) == ["B CAUSAL", "B NO_MASK", "F CAUSAL", "F NO_MASK"]
    assert not re.findall(r"(?:bf16|f32)\[[23],2,2048,8,128\]", dots)  # calls, sequences, chunk


@pytest.mark.deviceless
def test_splash_over_a_split_sequence_compiles_for_v5p():
    """Blocks of 512, chunks of 1,024: every device sees keys in 9 pairs of chunks of 4 blocks each, but for the block
    behind the diagonal in two of them."""
    text = compiled("tpu-v5p", "splash", Layout(context=4))
    assert len(re.findall(r'custom_call_target="tpu_custom_call"', text)) == 3  # forward, dq, dkv
    assert set(re.findall(r"sees_(\d+)_of_(\d+)_blocks", text)) == {(str(7 * 4 + 2 * 3), str(4 * 16))}


@pytest.mark.gpu
def test_cudnn_itself_joins_chunks_to_the_whole():
    if shutil.which("nvidia-smi") is None:
        pytest.skip("no NVIDIA GPU")
    environment = os.environ | {"JAX_PLATFORMS": "cuda", "XLA_FLAGS": "", "JAX_NUMPY_RANK_PROMOTION": "allow"}
    subprocess.run([sys.executable, str(Path(__file__))], check=True, env=environment, cwd=Path(__file__).parents[2])


def hold_cudnn_against_attend() -> None:
    """One GPU plays all of four devices in turn, for only a ring needs them at once."""
    C, L, H = 4, 2048, 128
    kernel = Kernel(cudnn_calls.forward, cudnn_calls.backward)
    q, k, v, d_out = (x.astype(jnp.bfloat16) for x in tensors(2, L, 2, 2, H, H))
    order = context_order(L, C)
    for mask in (Causal(), Everything()):
        tables = meetings_of(C, causal=mask == Causal(), ring=False)
        sizes = (L // C // 2, L // C // 2) if mask == Causal() else (L // C, L)

        def split(q, k, v, tables=tables, sizes=sizes):
            parts = [
                attend_chunks(
                    kernel, x.reshape(2, L // C, 4, H), k[:, order], v[:, order],
                    jax.tree.map(lambda t, d=d: jnp.asarray(t[d]), tables), sizes=sizes, scale=H**-0.5, ring=None,
                )
                for d, x in enumerate(jnp.split(q[:, order], C, axis=1))
            ]  # fmt: skip
            return jnp.concatenate(parts, axis=1)[:, np.argsort(order)].reshape(q.shape)

        def whole(q, k, v, mask=mask):
            return attend(q, k, v, mask, scale=H**-0.5)

        out, pull = jax.vjp(jax.jit(split), q, k, v)
        want, pull_whole = jax.vjp(jax.jit(whole), *(x.astype(jnp.float32) for x in (q, k, v)))
        found = zip((out, *pull(d_out)), (want, *pull_whole(d_out.astype(jnp.float32))), strict=True)
        for name, (a, b) in zip(("out", "dq", "dk", "dv"), found, strict=True):
            error = float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max())
            print(mask, name, error)
            assert error < 2**-6, (mask, name, error)


if __name__ == "__main__":
    hold_cudnn_against_attend()
