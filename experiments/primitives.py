"""What a device does alone, timed: products, elementwise passes, attention, collectives, launches, watts.

Each is repeated inside one compiled loop whose rounds depend on each other, so that the host's dispatch is no part of
it and the compiler can neither drop nor merge a round. Times are medians of loops that followed a warm-up.
"""

import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from transformer.sharding import Layout, make_mesh

Round = Callable[[Any], Any]
"""One round of work: from what it carries to the same with other values."""


class Timing(NamedTuple):
    """How long a loop runs, how many loops the median is of, and by which clock: a shared CPU has its processor's."""

    loop_s: float = 0.1
    loops: int = 5
    clock: Callable[[], float] = time.perf_counter


def seconds_per_round(work: Round, carried: Any, timing: Timing) -> float:
    """Median seconds of `work` on the carried arrays."""

    @jax.jit
    def loop(rounds: jax.Array, carried: Any) -> Any:
        return lax.fori_loop(0, rounds, lambda _, c: lax.optimization_barrier(work(c)), carried)

    def run(rounds: int) -> float:
        started = timing.clock()
        jax.block_until_ready(loop(jnp.int32(rounds), carried))
        return timing.clock() - started

    run(1)  # compiles
    return _per_round(run, timing)


def _per_round(run: Callable[[int], float], timing: Timing) -> float:
    """Median seconds of a round, of runs of as many as fill a loop."""
    rounds = 1
    while (took := run(rounds)) < timing.loop_s / 4 and rounds < 1 << 20:
        rounds *= 4
    rounds = max(1, round(rounds * timing.loop_s / took))
    return float(np.median([run(rounds) for _ in range(timing.loops)])) / rounds


def product_s(m: int, n: int, k: int, batch: int, dtype: Any, timing: Timing, *, turned: bool = False) -> float:
    """[batch, m, k] x [batch, k, n]; `turned`: of [k, m] and [n, k] as they lie. fp8 multiplies into bfloat16, as it
    does in training."""
    out = jnp.bfloat16 if jnp.dtype(dtype).itemsize == 1 else dtype
    shapes = ((batch, k, m), (batch, n, k)) if turned else ((batch, m, k), (batch, k, n))
    left, right = (_noise(shape, dtype) for shape in shapes)
    rows, columns = (1, 2) if turned else (2, 1)
    numbers: lax.DotDimensionNumbers = (((rows,), (columns,)), ((0,), (0,)))
    if batch == 1:  # a product of batches of one is another one
        left, right, numbers = left[0], right[0], (((rows - 1,), (columns - 1,)), ((), ()))

    def work(carried: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        left, right = carried
        product = lax.dot_general(left, right, numbers, preferred_element_type=out)
        product = lax.optimization_barrier(product)
        first = (0,) * left.ndim
        return left.at[first].set(product[first].astype(dtype)), right

    return seconds_per_round(work, (left, right), timing)


def pass_s(n_bytes: int, timing: Timing) -> float:
    """A pass from an array into another, which reads half of the bytes and writes half of them, and computes next to
    nothing."""
    x = _noise((n_bytes // 8 // 256, 256), jnp.float32)

    def work(carried: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, y = carried
        x = x.at[0, 0].set(y[0, 0])
        return x, x * 1.0001 + 0.1

    return seconds_per_round(work, (x, x + 1.0), timing)


class Operation(NamedTuple):
    """Something computed of arrays of one shape that `of` makes; what it costs of a class is told per element."""

    work: Callable[..., jax.Array]
    shape: tuple[int, ...]
    n_arrays: int = 1
    n_times: float = 1.0  # that an element is worked on, or arrays that it is read from


_FLAT = (32, 256, 256)
_ROWS = (1024, 512)  # of a feed-forward layer; before it the scores of a sequence
_ROUNDS = 32


def _polynomial(x: jax.Array) -> jax.Array:
    y = x
    for n in range(_ROUNDS):
        y = y * x + (1.0 + n)
    return y


def _turned(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def _chosen(x: jax.Array, y: jax.Array) -> jax.Array:
    return _turned(jnp.where(y > 0, x, 0.5))


def _gate(x: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """The gradient of a gated feed-forward layer, turned for the gradient of its weights."""
    return _turned(x * c * a + b * x * c * (a * (1 - a)))


def _softmax_gradient(s: jax.Array, p: jax.Array) -> jax.Array:
    return (s - jnp.sum(s * p, -1, keepdims=True)) * p


_ONE_BY_ONE = ((1, lambda x: _turned(1 - x)), (2, _chosen), (4, _gate))

OPERATIONS: Mapping[str, tuple[Operation, ...]] = {
    "arithmetic": (Operation(_polynomial, _FLAT, 1, 2 * _ROUNDS),),
    "function": tuple(Operation(f, _FLAT) for f in (jnp.exp, jnp.tanh, lax.erf)),
    "reduction": tuple(Operation(partial(f, axis=-1), _FLAT) for f in (jnp.sum, jnp.max)),
    "dotted": (Operation(_softmax_gradient, (32, 1, 256, 256), 2),),
    "crossing": tuple(
        Operation(f, shape, n, n)
        for shape in (_FLAT, _ROWS)
        for n, f in ((1, _turned), (2, lambda x, y: _turned(x * y)), (3, lambda x, y, z: _turned(x * y * z)))
    ),
    "scattered": tuple(Operation(f, _FLAT, n, n) for n, f in _ONE_BY_ONE),
    "scattered_far": tuple(Operation(f, _ROWS, n, n) for n, f in _ONE_BY_ONE),
}  # fmt: skip
"""What each class of `forecast/operations.py` is measured by: its mean."""


def operation_s(operation: Operation, timing: Timing) -> float:
    """Seconds of a whole operation between arrays that lie by rows. A call apart, for within a loop the compiler lays
    arrays out as it likes and nothing need be turned; the result's memory is that of the last call."""
    arrays = tuple(_noise(operation.shape, jnp.float32) + 0.1 * n for n in range(operation.n_arrays))
    call = jax.jit(lambda _, *arrays: operation.work(*arrays), donate_argnums=0, keep_unused=True)
    held = jax.jit(operation.work)(*arrays)

    def run(times: int) -> float:
        nonlocal held
        started = timing.clock()
        for _ in range(times):
            held = call(held, *arrays)
        jax.block_until_ready(held)
        return timing.clock() - started

    run(1)  # compiles
    return _per_round(run, timing)


def fresh_s(n_bytes: int, timing: Timing) -> float:
    """Seconds of writing so many bytes that the operating system has yet to give."""
    fill = jax.jit(lambda value: jnp.full((n_bytes // 4,), value))

    def run(times: int) -> float:
        started = timing.clock()
        for n in range(times):
            jax.block_until_ready(fill(jnp.float32(n)))
        return timing.clock() - started

    run(1)  # compiles
    return _per_round(run, timing)


def launch_s(timing: Timing, kernels: int = 32) -> float:
    """From one short kernel to the next."""

    def work(x: jax.Array) -> jax.Array:
        for _ in range(kernels):
            x = lax.optimization_barrier(x * 1.0001 + 0.1)
        return x

    return seconds_per_round(work, _noise((1024,), jnp.float32), timing) / kernels


def attention_s(length: int, heads: int, head: int, dtype: Any, *, backward: bool, timing: Timing) -> float:
    """Causal attention of one sequence as `transformer` runs it here: fused where the device has such a kernel."""
    implementation = "cudnn" if jax.default_backend() == "gpu" else None
    attend = partial(jax.nn.dot_product_attention, is_causal=True, implementation=implementation)
    qkv = tuple(_noise((1, length, heads, head), dtype) for _ in range(3))

    def forward(qkv: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return attend(*qkv), qkv[1], qkv[2]

    def both(qkv: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return jax.grad(lambda qkv: attend(*qkv).astype(jnp.float32).sum())(qkv)

    return seconds_per_round(both if backward else forward, qkv, timing)


def collective_s(kind: str, n_bytes: int, devices: Sequence[jax.Device], timing: Timing) -> float:
    """A collective over all of `devices`; `n_bytes` as in `Fabric.collective_s`."""
    g = len(devices)
    mesh = make_mesh(Layout(data=g), devices)
    size = n_bytes // 4 // (g * g) * g * g  # float32, a multiple of every split
    local = {
        "all-reduce": lambda x: lax.psum(x, "data") / g,
        "all-gather": lambda x: lax.all_gather(x, "data", tiled=True)[: size // g] * 1.0001,
        "reduce-scatter": lambda x: jnp.tile(lax.psum_scatter(x, "data", tiled=True), g),
        "all-to-all": lambda x: lax.all_to_all(x.reshape(g, -1), "data", 0, 0).ravel(),
    }[kind]
    held = size // g if kind == "all-gather" else size
    work = jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    x = jax.device_put(np.ones(held * g, np.float32), NamedSharding(mesh, P("data")))
    return seconds_per_round(work, x, timing)


def watts(work_s: float, work: Callable[[], object]) -> float | None:
    """Mean watts of the first board while `work` is repeated for `work_s`; None where no tool tells."""
    tool = shutil.which("nvidia-smi")
    if tool is None or jax.default_backend() != "gpu":
        return None
    query = [tool, "--query-gpu=power.draw", "--format=csv,noheader,nounits", "--id=0", "--loop-ms=200"]
    with subprocess.Popen(query, stdout=subprocess.PIPE, text=True) as asked:
        try:
            until = time.perf_counter() + work_s
            while time.perf_counter() < until:
                work()
        finally:
            asked.terminate()
        said = asked.communicate()[0].split()
    readings = [float(word) for word in said if word.replace(".", "", 1).isdigit()]
    return float(np.mean(readings[len(readings) // 2 :])) if readings else None


def _noise(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal numbers: a board that multiplies zeros draws less and runs faster than in training."""
    return jax.random.normal(jax.random.key(0), shape, jnp.float32).astype(dtype)
