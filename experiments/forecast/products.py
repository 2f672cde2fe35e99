"""Seconds of a matrix product on one device: tiles in waves, corrected by products of the device that were measured.

A GPU deals tiles of the result to its processors; a wave takes as long as one tile, and the last wave may be nearly
empty. What that leaves out (caches, clocks, choice of kernel) is the ratio of measured to modelled time, taken from
the nearest measured shapes. A device without processors to count (CPU, TPU) has a roofline in place of waves.
"""

import csv
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.spatial import KDTree

from experiments.forecast.constants import MXU_LANES, POWER_EXPONENT, PRODUCT_START_S, STEADY_FLOPS, TILE_FILL_K
from experiments.forecast.network import fact
from experiments.hardware import Device, load

TILES = np.array([(256, 256), (256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64)])
"""Rows and columns of a tile, as NVIDIA's CUTLASS has them from Ampere to Blackwell."""
SPLITS = (1, 2, 4)
"""Parts of k that several processors may share, where there are too few tiles."""
NEIGHBOURS = 8  # measured shapes that a correction is taken from, the nearer the more
BLUR = 0.25  # in log size: a row counts like one so far away, for rows scatter by some percent themselves
SPLIT_BYTES = 8  # a partial result is written and read in float32
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp8": 1, "int8": 1, "tf32": 4, "f32": 4}
TABLE = {"bf16": "bf16", "fp16": "bf16", "tf32": "bf16", "f32": "bf16", "fp8": "fp8", "int8": "fp8"}
"""Which measured type stands in for a type: the kernels of two types of one width differ little in shape."""

Numbers = Float[np.ndarray, "..."]


Row = tuple[float, float, float, float, float]
"""m, n, k, batch, seconds."""


class Shapes(NamedTuple):
    """Products of [m, k] with [k, n], `batch` of each; arrays of one shape."""

    m: Numbers
    n: Numbers
    k: Numbers
    batch: Numbers

    @property
    def flops(self) -> Numbers:
        return 2.0 * self.m * self.n * self.k * self.batch


def seconds(
    device: Device, shapes: Shapes, dtype: str, peak: float, *, sustained: bool, turned: bool = False
) -> Numbers:
    """Seconds of each product; `dtype` as facts name it. `sustained`: amid a training run, whose board is at its
    power limit; otherwise alone, as benchmarks measure. `turned`: as in `Product`; no slower where none was measured
    so."""
    measured = _measured(device, dtype, turned)
    if measured is None:
        alone = _modelled(device, shapes, dtype, peak)
    else:
        alone = np.maximum(measured.seconds(device, shapes, dtype, peak), shapes.flops / peak)
    most = sustained_flops_per_s(device, dtype, peak) if sustained else None
    return alone if most is None else np.maximum(alone, shapes.flops / most)


def _modelled(device: Device, shapes: Shapes, dtype: str, peak: float) -> Numbers:
    rate = peak * fact(device, "matmul_efficiency")
    if device.platform == "tpu":
        lanes, rows = MXU_LANES.value, 8
        padded = Shapes(_up(shapes.m, rows), _up(shapes.n, lanes), _up(shapes.k, lanes), shapes.batch)
        return padded.flops / rate
    if device.sm_count is None:
        return shapes.flops / rate
    bytes_per_s = fact(device, "hbm_bytes_per_s") * fact(device, "memory_efficiency")
    m, n, k, batch = (np.asarray(size, float)[..., None, None] for size in shapes)
    rows, columns = TILES.T[..., None]  # beside splits
    split = np.array(SPLITS)
    waves = np.ceil(np.ceil(m / rows) * np.ceil(n / columns) * batch * split / device.sm_count)
    tile_s = 2.0 * rows * columns * (k / split + TILE_FILL_K.value) / (rate / device.sm_count)
    partial_s = (split > 1) * split * batch * m * n * SPLIT_BYTES / bytes_per_s
    arithmetic_s = (waves * tile_s + partial_s).min(axis=(-1, -2))
    width = ELEMENT_BYTES[dtype]
    n_bytes = shapes.batch * ((shapes.m + shapes.n) * shapes.k * width + 2 * shapes.m * shapes.n)
    return np.maximum(arithmetic_s, n_bytes / bytes_per_s) + PRODUCT_START_S.value


def _up(size: Numbers, multiple: float) -> Numbers:
    return np.ceil(np.asarray(size) / multiple) * multiple


class Measured(NamedTuple):
    """Measured over modelled time, as logarithms, at places in log (batch x m, n, k), and batch where it varies."""

    places: KDTree
    log_ratio: Numbers
    by_batch: bool

    def seconds(self, device: Device, shapes: Shapes, dtype: str, peak: float) -> Numbers:
        """Modelled, times the ratio of the nearest: also beyond what was measured."""
        return _modelled(device, shapes, dtype, peak) * self._ratio(shapes)

    def _ratio(self, shapes: Shapes) -> Numbers:
        neighbours = min(NEIGHBOURS, len(self.log_ratio))
        near, which = self.places.query(_place(shapes, self.by_batch), range(1, neighbours + 1))
        weight = 1.0 / (np.asarray(near) ** 2 + BLUR**2)
        return np.exp((self.log_ratio[which] * weight).sum(-1) / weight.sum(-1))


def _place(shapes: Shapes, by_batch: bool) -> Numbers:
    sizes = (shapes.m * shapes.batch, shapes.n, shapes.k, shapes.batch if by_batch else np.ones_like(shapes.batch))
    return np.log(np.stack(sizes, axis=-1))


def fit(device: Device, dtype: str, peak: float, rows: Iterable[Row]) -> Measured:
    """The correction that makes the model give back `rows`."""
    *sizes, measured_s = np.array(list(rows), float).T
    shapes = Shapes(*sizes)
    by_batch = bool(np.any(shapes.batch > 1))
    log_ratio = np.log(measured_s) - np.log(_modelled(device, shapes, dtype, peak))
    return Measured(KDTree(_place(shapes, by_batch)), log_ratio, by_batch)


def _measured(device: Device, dtype: str, turned: bool) -> Measured | None:
    """From a calibration of this device, else from published rows of it or of the part that stands in for it."""
    if dtype in device.measured_products:
        turned = turned and dtype in device.measured_turned_products
        known = device.measured_turned_products if turned else device.measured_products
        rows = tuple(tuple(row) for row in known[dtype])
        return _fit(device, dtype, device.peak_flops_per_s[dtype], rows)
    part = part_of(device)
    return _stand_in(part, TABLE[dtype]) if (part, TABLE[dtype]) in published() else None


def part_of(device: Device) -> str:
    """The slug under which products were published: its own, or of the part that its facts say stands in."""
    known = {slug for slug, _ in published()}
    return next((slug for slug in (device.slug, device.products_of, device.like) if slug in known), device.slug)


@cache
def _fit(device: Device, dtype: str, peak: float, rows: tuple[Row, ...]) -> Measured:
    return fit(device, dtype, peak, rows)


@cache
def _stand_in(slug: str, dtype: str) -> Measured:
    """A ratio of times carries over from part to part, times themselves do not."""
    device = load().device(slug)
    return fit(device, dtype, device.peak(dtype), published()[slug, dtype])


@cache
def published() -> Mapping[tuple[str, str], list[Row]]:
    """Rows of published/products.csv by device and type."""
    text = resources.files("experiments").joinpath("published/products.csv").read_text(encoding="utf-8")
    found: dict[tuple[str, str], list[Row]] = {}
    for row in csv.DictReader(line for line in text.splitlines() if not line.startswith("#")):
        device, dtype, m, n = row.pop("device"), row.pop("dtype"), float(row.pop("m")), float(row.pop("n"))
        rows = found.setdefault((device, dtype), [])
        rows += [(m, n, float(k), 1.0, 2 * m * n * float(k) / (float(rate) * 1e12)) for k, rate in row.items() if rate]
    return found


@cache
def sustained_flops_per_s(device: Device, dtype: str, peak: float) -> float | None:
    """The most that a board multiplies at its power limit: what facts say of it or of its part, else the median rate of
    bf16 products so large that clocks have settled, times the type's peak over bf16's. Another board of the same part:
    by its limit. None where unknown."""
    if device.measured_products:
        return None
    if device.sustained_flops_per_s:
        return device.sustained_flops_per_s * peak / device.peak("bf16")
    rows = published().get((part_of(device), "bf16"))
    if rows is None:
        return None
    part = load().device(part_of(device))
    steady = [2 * m * n * k / s for m, n, k, _, s in rows if 2 * m * n * k >= STEADY_FLOPS.value]
    of_part = part.sustained_flops_per_s or float(np.median(steady))
    watts = fact(device, "tdp_w") / fact(part, "tdp_w")
    return of_part * watts**POWER_EXPONENT.value * peak / device.peak("bf16")
