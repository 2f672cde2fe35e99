"""The torus of a TPU slice: which of its dims a group lies along, how far it reaches, how many links carry it."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np


class Reach(NamedTuple):
    """How a group lies in a torus: in each dim along which its devices differ, how many places it has and whether
    these close to a ring; and the hops between its two farthest devices."""

    n: int
    extents: tuple[int, ...]
    closes: tuple[bool, ...]
    hops: int

    def links(self, kind: str) -> float:
        """Links' worth of bandwidth, one direction, for `n_bytes` as `Fabric.collective_s` counts them.

        A gather uses every dim, both ways round where it closes. In an all-to-all half of the bytes cross the middle
        of the longest dim, n / extent rows wide: n / 2 devices send half of theirs, so e / 4 (or 8, closed) links'
        time a byte (Austin et al., How to scale your model, 2025, "sharded matrices").
        """
        if kind == "collective-permute" or self.n == 2:
            return 1.0
        ways = [2 if closed else 1 for closed in self.closes]
        gather = float(max(1, sum(ways)))
        if kind != "all-to-all":
            return gather
        middle = min(4 * way / extent for extent, way in zip(self.extents, ways, strict=True))
        return min(gather, middle)


@dataclass(frozen=True)
class Torus:
    """Positions of all chips of a slice, by logical device, in pods of `dims` dims."""

    coords: np.ndarray
    dims: int

    def reach(self, ids: np.ndarray) -> Reach:
        """Where the devices `ids` stand."""
        places = self.coords[ids]
        extents, closes, hops = [], [], 0
        for d, size in enumerate(self.sizes):
            n = len(np.unique(places[:, d]))
            if n == 1:
                continue
            closed = self.wraps(size)
            far = int(np.ptp(places[:, d]))
            extents.append(n)
            closes.append(closed and n == size)
            hops += min(far, size // 2) if closed else far
        return Reach(len(ids), tuple(extents), tuple(closes), hops)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(int(size) for size in self.coords.max(axis=0) + 1)

    def wraps(self, size: int) -> bool:
        """3D pods are built of 4 x 4 x 4 cubes joined by switches: dims of whole cubes close. 2D pods close at 16."""
        if self.dims == 3:
            return all(side % 4 == 0 for side in self.sizes)
        return size == 16
