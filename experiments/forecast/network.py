"""Seconds that a collective takes over the links that its group really crosses.

Ring algorithms move S (g - 1) / g bytes out of every device for a gather or a scatter of S bytes over
g devices, twice that for an all-reduce (Thakur et al. 2005; NCCL's "bus bandwidth" is defined by it).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from experiments.hardware import Device
from transformer.errors import RequestError

_PASSES = {"all-reduce": 2.0}  # a scatter and a gather


def fact(device: Device, name: str) -> float:
    """A figure that a forecast cannot do without. RequestError where no source gives it."""
    value = getattr(device, name)
    if value is None:
        raise RequestError(f"no {name} is known for {device.slug!r}, and the forecast needs it: give it with --facts")
    return value


@dataclass(frozen=True)
class Fabric:
    """Where the devices of a mesh stand. `coords` are the torus positions of TPU chips, else None."""

    device: Device
    coords: tuple[tuple[int, ...], ...] | None = None

    def collective_s(self, kind: str, n_bytes: float, group: Sequence[int]) -> float:
        """Seconds for a collective over the logical devices `group`.

        `n_bytes` is the whole: what a gather makes, what a scatter or reduction takes, what one device
        sends in an all-to-all or a permutation.
        """
        g = len(group)
        if g < 2 or n_bytes == 0:
            return 0.0
        share = 1.0 if kind == "collective-permute" else _PASSES.get(kind, 1.0) * (g - 1) / g
        return share * n_bytes / self._bytes_per_s(group) + self._latency_s(group)

    def _latency_s(self, group: Sequence[int]) -> float:
        """Seconds beyond the bytes: a ring's hops in the small, a tree's up and down in the large."""
        hops = min(len(group) - 1, 2 * math.ceil(math.log2(len(group))))
        device = self.device
        hop_s = device.link_latency_s if self._is_inside(group) else device.nic_latency_s
        return (device.collective_launch_s or 0.0) + hops * (hop_s or 0.0)

    def _is_inside(self, group: Sequence[int]) -> bool:
        """Whether a group never leaves the fast links: the torus, the memory, or one scale-up domain."""
        device = self.device
        if self.coords is not None or device.platform == "cpu":
            return True
        return len({i // self._domain for i in group}) == 1

    def _bytes_per_s(self, group: Sequence[int]) -> float:
        """One direction, per device, at the narrowest place that the ring passes, achieved."""
        device = self.device
        if device.platform == "cpu":  # virtual devices meet in memory
            return fact(device, "hbm_bytes_per_s") * fact(device, "memory_efficiency")
        efficiency = fact(device, "link_efficiency")
        if self.coords is not None:
            return efficiency * self._torus_bytes_per_s(group)
        link_bytes_per_s = fact(device, "link_bytes_per_s")
        if self._is_inside(group):
            return efficiency * link_bytes_per_s
        domain = self._domain
        # Members that share a domain share the way out: a ring per member, each leaving by another NIC.
        members = min(sum(i // domain == j // domain for j in group) for i in (group[0], group[-1]))
        out = members * fact(device, "nic_bytes_per_s") / device.oversubscription
        return efficiency * min(link_bytes_per_s, out)

    @property
    def _domain(self) -> int:
        """Devices that share the fast links."""
        return self.device.scaleup_devices or int(fact(self.device, "devices_per_node"))

    def _torus_bytes_per_s(self, group: Sequence[int]) -> float:
        """The group's torus dims, each with two directions where it wraps round and one where it does not."""
        assert self.coords is not None
        places = [self.coords[i] for i in group]
        if len(places) == 2:
            return fact(self.device, "ici_bytes_per_s")  # one path
        links = 0
        for d, size in enumerate(self._torus_sizes):
            n = len({place[d] for place in places})
            if n > 1:
                links += 2 if n == size and self._wraps(size) else 1
        return max(links, 1) * fact(self.device, "ici_bytes_per_s")

    @cached_property
    def _torus_sizes(self) -> tuple[int, ...]:
        assert self.coords is not None
        return tuple(max(place[d] for place in self.coords) + 1 for d in range(len(self.coords[0])))

    def _wraps(self, size: int) -> bool:
        """3D pods are built of 4x4x4 cubes joined by switches: multiples of 4 close. 2D pods close at 16."""
        return size % 4 == 0 if self.device.torus_dims == 3 else size == 16
