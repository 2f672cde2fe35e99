"""What a device does alone, timed: products, elementwise passes, attention, collectives, launches, watts.

Each is repeated inside one compiled loop whose rounds depend on each other, so that the host's dispatch is no part of
it and the compiler can neither drop nor merge a round. Times are medians of loops that followed a warm-up.
"""

import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
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
    rounds = 1
    while (took := run(rounds)) < timing.loop_s / 4 and rounds < 1 << 20:
        rounds *= 4
    rounds = max(1, round(rounds * timing.loop_s / took))
    return float(np.median([run(rounds) for _ in range(timing.loops)])) / rounds


def product_s(m: int, n: int, k: int, batch: int, dtype: Any, timing: Timing) -> float:
    """[batch, m, k] x [batch, k, n]. fp8 multiplies into bfloat16, as it does in training."""
    out = jnp.bfloat16 if jnp.dtype(dtype).itemsize == 1 else dtype
    left, right = (_noise(shape, dtype) for shape in ((batch, m, k), (batch, k, n)))

    def work(carried: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        left, right = carried
        product = lax.dot_general(left, right, (((2,), (1,)), ((0,), (0,))), preferred_element_type=out)
        product = lax.optimization_barrier(product)
        return left.at[0, 0, 0].set(product[0, 0, 0].astype(dtype)), right

    return seconds_per_round(work, (left, right), timing)


def pass_s(n_bytes: int, timing: Timing) -> float:
    """A pass over an array, which reads half of the bytes and writes half of them: the mean of the sorts that a
    Transformer's layers have. To an accelerator they are all the same; a CPU computes exponentials and moves heads
    much slower than it scales."""
    passes = (
        lambda x: x * 1.0001 + 0.1,
        jax.nn.softmax,
        jax.nn.silu,
        lambda x: x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5),
        lambda x: x.reshape(-1, 64, 4, 64).transpose(0, 2, 3, 1).reshape(x.shape) * 1.0001,  # heads, transposed
    )

    def work(x: jax.Array) -> jax.Array:
        for each in passes:
            x = lax.optimization_barrier(each(x))
        return x

    return seconds_per_round(work, _noise((n_bytes // 8 // 256, 256), jnp.float32), timing) / len(passes)


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
