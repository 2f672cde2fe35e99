"""Which devices an axis joins, and the seconds that a collective over it takes."""

import math
from functools import lru_cache

from experiments.forecast.network import Fabric
from experiments.forecast.topology import torus_shape
from experiments.hardware import Device
from transformer.sharding import AXES

SHARDS: tuple[str, ...] = ("fsdp", "expert", "context")
"""Axes over which dense weights, or their optimizer, are split by ZeRO."""

EXPERT_SHARDS: tuple[str, ...] = ("fsdp", "context")
"""The same of the experts' weights."""

REPLICAS: tuple[str, ...] = ("data", *SHARDS)
"""Axes whose devices hold other tokens, between which gradients are summed within a slice."""

_SPANS: dict[tuple[str, ...], tuple[int, int]] = {
    axes: (AXES.index(axes[0]), AXES.index(axes[-1]))
    for axes in (SHARDS, EXPERT_SHARDS, REPLICAS, ("data", *EXPERT_SHARDS), *((axis,) for axis in AXES))
}

_STEP = math.log(1.05)


class Places:
    """The devices of a layout numbered as the mesh numbers them: AXES, the last one closest."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._seconds = lru_cache(maxsize=1 << 16)(self._uncached)
        self._fabric = lru_cache(maxsize=64)(self._make_fabric)
        self._straggle = lru_cache(maxsize=1 << 12)(Fabric(device).slowest)

    def collective_s(self, sizes: tuple[int, ...], kind: str, n_bytes: float, axes: tuple[str, ...]) -> float:
        """`n_bytes` is the whole, as in `Fabric.collective_s`. `sizes` are a layout's; `axes` stand side by side in
        AXES, or what is between them has size 1; else the group is taken to stand at the stride of the last."""
        if n_bytes <= 0:
            return 0.0
        first, last = _SPANS[axes]
        size = math.prod(sizes[i] for i in range(first, last + 1) if AXES[i] in axes)
        if size == 1:
            return 0.0
        while sizes[last] == 1 or AXES[last] not in axes:
            last -= 1
        return self._near(n_bytes, kind, size, math.prod(sizes[last + 1 :]), sizes[0], math.prod(sizes[1:]))

    def neighbour_s(self, sizes: tuple[int, ...], n_bytes: float) -> float:
        """A message from one pipeline stage to the next."""
        stride = math.prod(sizes[2:])
        return self._near(n_bytes, "collective-permute", 2, stride, sizes[0], math.prod(sizes[1:]))

    def slowest(self, n_devices: int) -> float:
        """Time of a step that all devices end together, over the mean's."""
        return self._straggle(n_devices)

    def _near(self, n_bytes: float, kind: str, *group: int) -> float:
        """In proportion to the nearest of sizes 5 % apart, which a search then asks for only once: of the latency
        that is wrong by 2.5 % at most, of the rest nothing."""
        grid = 1.05 ** round(math.log(n_bytes) / _STEP)
        return n_bytes / grid * self._seconds(kind, grid, *group)

    def _uncached(self, kind: str, n_bytes: float, size: int, stride: int, slices: int, within: int) -> float:
        return self._fabric(slices, within).along_s(kind, n_bytes, (size, stride))

    def _make_fabric(self, slices: int, within: int) -> Fabric:
        if self.device.platform != "tpu":
            return Fabric(self.device)
        places = torus_places(self.device, within)
        return Fabric(self.device, places * slices, tuple(i for i in range(slices) for _ in range(within)))


def torus_places(device: Device, n_devices: int) -> tuple[tuple[int, ...], ...]:
    """Positions of the chips of a slice, numbered row by row: so a mesh axis lies along as few torus dims as it can.
    A count that no slice has takes the next larger one's places."""
    dims = device.torus_dims or 2
    n = n_devices
    while (shape := torus_shape(n, dims=dims)) is None:
        n += 1
        if n > 16 * n_devices + 4096:
            shape = (*(1,) * (dims - 1), n_devices)
            break
    found = []
    for i in range(n_devices):
        place = []
        for side in reversed(shape):
            i, at = divmod(i, side)
            place.append(at)
        found.append(tuple(reversed(place)))
    return tuple(found)
