"""Seconds that a collective takes over the links that its group really crosses.

A message that travels in parts through a row of links takes (Thakur et al. 2005, with the best size of part)

    launch + waiting + (sqrt(filling) + sqrt(bytes / bandwidth))^2

`filling` is the latency of the links that a part passes before the last of them works, `waiting` that of the other
steps. Ring algorithms move S (g - 1) / g bytes out of every device for a gather or a scatter of S bytes over g
devices, twice that for an all-reduce. Where a switch adds up (NVLS), S (1 + 1 / g) in all. Several domains of fast
links (nodes, slices) work on other parts while the network between them does: the slower of the two counts, and the
steps of both.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from experiments.forecast import constants
from experiments.forecast.torus import Reach, Torus
from experiments.hardware import Device
from transformer.errors import RequestError


def fact(device: Device, name: str) -> float:
    """A figure that a forecast cannot do without. RequestError where no source gives it."""
    value = getattr(device, name)
    if value is None:
        raise RequestError(f"no {name} is known for {device.slug!r}, and the forecast needs it: give it with --facts")
    return value


class Message(NamedTuple):
    """What an algorithm costs, in seconds: steps that wait for one another, hops that a pipeline fills, bytes."""

    waiting: float = 0.0
    filling: float = 0.0
    bytes: float = 0.0

    @property
    def seconds(self) -> float:
        return self.waiting + (math.sqrt(self.filling) + math.sqrt(self.bytes)) ** 2


class Group(NamedTuple):
    """Where a group stands: `n` devices in `n_domains` domains of fast links, at least `members` of them in each."""

    n: int
    n_domains: int = 1
    members: int = 1
    reach: Reach | None = None  # of its members in a slice


@dataclass(frozen=True)
class Fabric:
    """Where the devices of a mesh stand. `coords` are the torus positions of TPU chips, else None; `slices` the
    slice of each where there are several, joined by the data-centre network."""

    device: Device
    coords: tuple[tuple[int, ...], ...] | None = None
    slices: tuple[int, ...] | None = None

    def collective_s(self, kind: str, n_bytes: float, group: Sequence[int]) -> float:
        """Seconds for a collective over the logical devices `group`.

        `n_bytes` is the whole: what a gather makes, what a scatter or reduction takes, what one device
        sends in an all-to-all or a permutation.
        """
        if len(group) < 2 or n_bytes == 0:
            return 0.0
        ids = np.arange(group.start, group.stop, group.step) if isinstance(group, range) else np.asarray(group)
        return self._seconds(kind, n_bytes, self._group(ids))

    def along_s(self, kind: str, n_bytes: float, *axes: tuple[int, int]) -> float:
        """The same for the group of device 0, given by the (size, stride) of each mesh axis that it lies along, and
        remembered: `along_s("all-gather", 1e9, (128, 8))` joins every eighth of 1,024 devices."""
        if not any(size > 1 for size, _ in axes) or n_bytes == 0:
            return 0.0
        if axes not in self._seen:
            ids = sum(np.ix_(*(np.arange(size) * stride for size, stride in axes)), np.array(0)).ravel()
            self._seen[axes] = self._group(np.sort(ids))
        return self._seconds(kind, n_bytes, self._seen[axes])

    def slowest(self, n_devices: int) -> float:
        """Time of a step that all devices end together, over that of the mean node: the expected largest of as many
        normal times as there are nodes, whose devices share power, cooling and host."""
        nodes = max(1, n_devices // (self.device.devices_per_node or 1))
        return 1.0 + constants.STEP_VARIATION.value * expected_largest(nodes)

    def _seconds(self, kind: str, n_bytes: float, group: Group) -> float:
        message = self._inside(kind, n_bytes, group)
        if group.n_domains > 1:
            out = self._outside(kind, n_bytes, group)
            steps = message.waiting + message.filling + out.waiting
            message = Message(steps, out.filling, max(message.bytes, out.bytes))
        return (self.device.collective_launch_s or 0.0) + message.seconds

    def _inside(self, kind: str, n_bytes: float, group: Group) -> Message:
        """On the links of a domain: of the one where the whole group stands, or of each of several."""
        if kind == "collective-permute" and group.n_domains > 1:
            return Message()
        if group.reach is not None:
            return self._on_torus(kind, n_bytes, group, group.reach)
        return self._on_switch(kind, n_bytes, group)

    def _on_torus(self, kind: str, n_bytes: float, group: Group, reach: Reach) -> Message:
        if reach.n < 2:
            return Message()
        passes = 2 if kind == "all-reduce" else 1
        link_bytes_per_s = fact(self.device, "ici_bytes_per_s") * fact(self.device, "link_efficiency")
        moved = _moved(kind, group.n, reach.n) * n_bytes / (reach.links(kind) * link_bytes_per_s)
        return Message(waiting=passes * reach.hops * (self.device.link_latency_s or 0.0), bytes=moved)

    def _on_switch(self, kind: str, n_bytes: float, group: Group) -> Message:
        device, n, m, several = self.device, group.n, group.members, group.n_domains > 1
        hop_s = device.link_latency_s or 0.0
        rate = self._link_bytes_per_s
        own = (
            constants.LOCAL_COPY.value if device.sm_count else 0.0
        )  # by its processors, out of one buffer into another
        if kind == "collective-permute":
            return Message(filling=hop_s, bytes=n_bytes / rate)
        if kind == "all-to-all":
            hops = math.ceil(math.log2(m)) + 1
            return Message(filling=hops * hop_s, bytes=(m - 1 + own) / n * n_bytes / rate)
        if kind != "all-reduce":
            hops = n - group.n_domains if several else _hops(n)
            filling = min(hops, constants.RING_FILLING_HOPS.value)
            return Message((hops - filling) * hop_s, filling * hop_s, (n - 1 + own) / n * n_bytes / rate)
        hops = 2 * _hops(m)
        filling = min(hops, constants.RING_FILLING_HOPS.value)
        moved = [2 * (m - 1) / m * n_bytes / rate]
        if device.switch_reduces and m > 2:
            moved.append((1 + 1 / m) * n_bytes / (fact(device, "link_bytes_per_s") * constants.SWITCH_REDUCTION.value))
        return Message((hops - filling) * hop_s, filling * hop_s, min(moved))

    def _outside(self, kind: str, n_bytes: float, group: Group) -> Message:
        """What leaves the domains. Members that share a domain share the way out: a ring for each, each leaving by
        another adapter; or a tree between domains, of as many bytes."""
        device, n, d, m = self.device, group.n, group.n_domains, group.members
        hop_s = device.nic_latency_s or 0.0
        efficiency = constants.NETWORK_EFFICIENCY if self.coords is None else constants.DCN_EFFICIENCY
        rate = fact(device, "nic_bytes_per_s") / device.oversubscription * efficiency.value
        if kind == "collective-permute":
            return Message(filling=hop_s, bytes=n_bytes / rate)
        if kind == "all-to-all":  # by each device's own adapter
            return Message(math.ceil(math.log2(d)) * hop_s, 0.0, (n - m) / n * n_bytes / rate)
        # Slices, and two nodes, send each other what the other lacks; a ring over more passes every edge n - 1 times.
        ring = (n - 1) / n if self.coords is None and d > 2 else (d - 1) / d
        if kind == "all-reduce":
            hops, moved = min(2 * (d - 1), _hops(d)), 2 * ring
        else:  # NCCL's trees for gathers want one member in a node
            hops, moved = _hops(d) if m == 1 else d - 1, ring if self.coords is not None else (n - 1) / n
        filling = min(hops, constants.NETWORK_FILLING_HOPS.value)
        return Message((hops - filling) * hop_s, filling * hop_s, moved * n_bytes / (m * rate))

    def _group(self, ids: np.ndarray) -> Group:
        """Members are counted in the domains of the first device and of the last: the ring's narrowest places."""
        domains = self._slice_of[ids] if self.coords is not None else ids // self._domain
        n_domains = len(np.unique(domains))
        members = min(int(np.count_nonzero(domains == domains[end])) for end in (0, -1))
        reach = self._torus.reach(ids[domains == domains[0]]) if self.coords is not None else None
        return Group(len(ids), n_domains, members, reach)

    @cached_property
    def _seen(self) -> dict[tuple[tuple[int, int], ...], Group]:
        return {}

    @cached_property
    def _torus(self) -> Torus:
        return Torus(np.asarray(self.coords), int(fact(self.device, "torus_dims")))

    @cached_property
    def _slice_of(self) -> np.ndarray:
        assert self.coords is not None
        return np.zeros(len(self.coords), int) if self.slices is None else np.asarray(self.slices)

    @cached_property
    def _link_bytes_per_s(self) -> float:
        """One direction, achieved. Virtual devices of a CPU meet in memory, where their links were not measured."""
        device = self.device
        if device.platform == "cpu" and device.link_bytes_per_s is None:
            return fact(device, "hbm_bytes_per_s") * fact(device, "memory_efficiency")
        return fact(device, "link_bytes_per_s") * fact(device, "link_efficiency")

    @cached_property
    def _domain(self) -> int:
        """Devices that share the fast links."""
        if self.device.platform == "cpu" and self.device.devices_per_node is None:
            return 1 << 30
        return self.device.scaleup_devices or int(fact(self.device, "devices_per_node"))


def expected_largest(n: int) -> float:
    """Of n standard normal numbers, in the mean (Blom 1958).

    >>> [round(expected_largest(n), 2) for n in (1, 2, 1000)]
    [0.0, 0.59, 3.23]
    """
    return NormalDist().inv_cdf((n - 0.375) / (n + 0.25))


def _hops(n: int) -> int:
    """A ring's in the small; in the large up a binary tree and down, and the root's own."""
    return min(n - 1, 2 * math.ceil(math.log2(n)) + 1)


def _moved(kind: str, n: int, m: int) -> float:
    """Part of the whole that a device's links carry, of a group of n devices of which m share the links."""
    if kind == "collective-permute":
        return 1.0
    if kind == "all-to-all":
        return m / n
    return (2.0 if kind == "all-reduce" else 1.0) * (m - 1) / m
