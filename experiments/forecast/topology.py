"""Clusters to compile for: JAX devices of machines that are not there.

The one file that touches private parts of JAX and of its plugins, each with its reason beside it.
"""

import itertools
import math
import os
import tomllib
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

import jax

from experiments.forecast.network import fact
from experiments.hardware import Device
from transformer.backends import Chip
from transformer.errors import RequestError, nearest
from transformer.sharding import Layout

CUDNN_VERSION = 91_000  # what the targets' nodes are taken to have installed

_TPU_NAMES = {"tpu-v3": "v3", "tpu-v4": "v4", "tpu-v5e": "v5e", "tpu-v5p": "v5p", "tpu-v6e": "v6e", "tpu-v7": "tpu7x"}

_NO_CLOUD = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip
"""libtpu asks the cloud which machine it is on, and prints errors where there is none: any answer will do to compile.
It also lets one process at a time use the chips: those that only compile need not wait for each other."""

_GPU_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_memory_per_core}
  shared_memory_per_block_optin: {shared_memory_per_block_optin}
  core_count: {core_count} fpus_per_core: {fpus_per_core} clock_rate_ghz: {clock_rate_ghz}
  memory_bandwidth: {memory_bandwidth} l2_cache_size: {l2_cache_size} device_memory_size: {device_memory_size}
  cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""


def devices_of(device: Device, layout: Layout) -> Sequence[jax.Device]:
    """As many absent devices as a layout has, of the kind that `device` is compiled for; TPUs in its slices.

    Raises RequestError if its compiler is not installed, or no such cluster can be built.
    """
    target = device.compile_target
    if device.slug == "cpu":
        return _cpus(device, layout.n_devices)
    if device.platform == "cpu":
        raise RequestError(f"{device.slug} cannot be compiled for when absent: measure it with experiments.ladder")
    if target in _TPU_NAMES:
        return _tpus(target, layout.n_devices, layout.slice)
    return _gpus(target, layout.n_devices, int(fact(device, "devices_per_node")))


def chip_of(device: Device) -> Chip:
    """As `step.chip_of` sees the devices that this one is compiled for, without making any."""
    target = _targets().get(device.compile_target)
    return Chip(device.platform, tuple(target["capability"]) if device.platform == "gpu" and target else None)


def _cpus(device: Device, n_devices: int) -> Sequence[jax.Device]:
    """This machine's own, as virtual devices: another CPU's compiler is not to be had."""
    if device.hbm_bytes_per_s is None or not device.peak_flops_per_s:
        raise RequestError(f"nothing is known of {device.slug!r} here: run experiments.calibrate and pass its --facts")
    found = jax.devices("cpu")
    if n_devices > len(found):
        raise RequestError(f"{n_devices} virtual devices: {len(found)} are there; set JAX_NUM_CPU_DEVICES={n_devices}")
    return found[:n_devices]


def _gpus(target: str, n_devices: int, devices_per_node: int) -> Sequence[jax.Device]:
    described = _targets()
    if target not in described:
        raise RequestError(f"no compiler target for {target!r}: {nearest(target, described)}")
    per_node = min(devices_per_node, n_devices)
    if n_devices % per_node:
        low = n_devices // per_node * per_node
        raise RequestError(
            f"{n_devices} devices do not fill nodes of {per_node}; nearest that do: {low} or {low + per_node}"
        )
    _answer_for_cudnn(tuple(described[target]["capability"]))
    return _describe(
        target, "cuda", target_config=_GPU_TARGET.format(**described[target]),
        topology=f"1x{n_devices // per_node}x{per_node}",
    )  # fmt: skip


@cache
def _targets() -> dict[str, Any]:
    return tomllib.loads(resources.files("experiments.forecast").joinpath("targets.toml").read_text())


def _tpus(target: str, n_devices: int, slices: int) -> Sequence[jax.Device]:
    for name, value in _NO_CLOUD.items():
        os.environ.setdefault(name, value)
    per_chip = 2 if target in ("tpu-v3", "tpu-v7") else 1
    chips, odd = divmod(n_devices // slices, per_chip)
    shape = None if odd else torus_shape(chips, dims=2 if target in ("tpu-v3", "tpu-v5e", "tpu-v6e") else 3)
    if shape is None:
        near = _nearest_slice(target, n_devices // slices)
        raise RequestError(f"no {target} slice has {n_devices // slices} devices; nearest: {near}")
    options = {}
    if target == "tpu-v4":
        options["chip_config_name"] = "megacore"  # as JAX shows a v4 chip: one device of both its cores
    if slices > 1:
        options["num_slices"] = slices
    if chips < 4:  # smaller than a host
        options["chips_per_host_bounds"] = (*shape, 1)[:3]
    return _describe(f"{_TPU_NAMES[target]}:{'x'.join(map(str, shape))}", "tpu", **options)


def torus_shape(chips: int, *, dims: int) -> tuple[int, ...] | None:
    """The most compact slice that Google sells with so many chips, or None.

    2D: powers of two up to 16 x 16. 3D: sides of 1, 2 or 4 below a cube of 4 x 4 x 4; above it, cubes side by side.

    >>> torus_shape(32, dims=2), torus_shape(4, dims=3), torus_shape(6144, dims=3), torus_shape(65, dims=3)
    ((4, 8), (2, 2, 1), (16, 16, 24), None)
    """
    small = (1, 2, 4, 8, 16) if dims == 2 else (1, 2, 4)
    sides = range(4, 29, 4) if dims == 3 and chips >= 64 else small
    shapes = [s for s in itertools.combinations_with_replacement(sides, dims) if math.prod(s) == chips]
    compact = min(shapes, key=lambda s: s[-1] - s[0], default=None)
    return compact and tuple(sorted(compact, key=lambda side: side == 1))  # hosts are 2 x 2 in the first dims


def _nearest_slice(target: str, n_devices: int) -> int:
    per_chip = 2 if target in ("tpu-v3", "tpu-v7") else 1
    dims = 2 if target in ("tpu-v3", "tpu-v5e", "tpu-v6e") else 3
    sizes = [n for n in range(1, 256 if dims == 2 else 28 * 28 * 28) if torus_shape(n, dims=dims)] or [1]
    return per_chip * min((*sizes, 256), key=lambda n: abs(n * per_chip - n_devices))


def keep_in_host(lowered: jax.stages.Lowered, arrays: Sequence[tuple[int, bool]]) -> None:
    """Let the first arrays that a lowered program takes, and the first that it gives, lie in the host's memory: of each
    its number of dims, and whether it does. Absent GPUs do not say which memories they have, so JAX forgets what a
    sharding says of them; the compiler is told by the program's attributes."""
    from jaxlib.mlir import ir

    module: Any = lowered.compiler_ir()
    (main,) = (f for f in module.body.operations if str(f.name).strip('"') == "main")

    def placed(attributes: Sequence[Any]) -> ir.ArrayAttr:
        rest = len(attributes) - len(arrays)
        return ir.ArrayAttr.get(
            [_placed(ir, a, *array) for a, array in zip(attributes, [*arrays, *[(0, False)] * rest], strict=True)]
        )

    with main.context:
        main.attributes["arg_attrs"] = placed(main.attributes["arg_attrs"])
        main.attributes["res_attrs"] = placed(main.attributes["res_attrs"])


def _placed(ir: Any, attributes: Any, n_dims: int, in_host: bool) -> Any:
    named = {a.name: a.attr for a in attributes}
    named["mhlo.memory_kind"] = ir.StringAttr.get("pinned_host" if in_host else "device")
    if in_host:
        order = ",".join(str(i) for i in reversed(range(n_dims)))
        named["mhlo.layout_mode"] = ir.StringAttr.get(f"{{{order}:S(5)}}")
    return ir.DictAttr.get(named)


@cache
def _describe(name: str, platform: str, **options: object) -> Sequence[jax.Device]:
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(name, platform=platform, **_thawed(options)).devices
    except (RuntimeError, ImportError, NotImplementedError, ValueError) as error:
        raise RequestError(
            f"no {platform} compiler for {name!r}: install the extra that brings it, "
            f"pip install '.[deviceless]' ({str(error).splitlines()[0][:200]})"
        ) from error


def _thawed(options: dict[str, object]) -> dict[str, object]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}


def _answer_for_cudnn(capability: tuple[int, ...]) -> None:
    """JAX asks the attached cuDNN for its version before it emits attention calls, and the attached GPU for its
    generation, which decides the largest head (256 from Hopper on, else 128). It has no public way to be told:
    answer for the absent node that was last asked for. The compiler itself needs no cuDNN."""
    from jax._src.cudnn import fused_attention_stablehlo

    def at_least(wanted: str) -> bool:
        return capability >= tuple(int(part) for part in wanted.split("."))

    fused_attention_stablehlo.check_cudnn_version = lambda: CUDNN_VERSION
    fused_attention_stablehlo.check_compute_capability = at_least
