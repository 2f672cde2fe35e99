"""Which devices a collective joins, in every syntax that XLA prints."""

import math
import re
from collections.abc import Iterable

import numpy as np

from transformer.sharding import AXES, Layout

_PAIRS = re.compile(r"source_target_pairs=\"?\{((?:\{\d+,\d+\},?)*)\}")


def replica_group(attributes: str, n_devices: int) -> list[int]:
    """Logical device ids of the first group of a collective, in any syntax that XLA prints."""
    found = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if found:
        return list(numbers(found.group(1)))
    found = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if found:
        groups, dims, turn = (numbers(g) for g in found.groups(default=""))
        return _iota(dims, turn or tuple(range(len(dims))))[: groups[-1]]
    found = re.search(r"replica_groups=(?:@\w+|mesh)\[([^\]]*)\]([^{]*)\{([^}]*)\}", attributes)
    if found:
        sizes = {k.strip("'\" "): int(v) for k, v in (part.split("=") for part in found.group(1).split(","))}
        places = _along(sizes, re.findall(r"['\"](\w+)['\"](?::\((\d+)\)(\d+))?", found.group(3)))
        order = re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", found.group(2))
        if order is None:
            return places
        dims, turn = (numbers(g) for g in order.groups(default=""))
        ids = _iota(dims, turn or tuple(range(len(dims))))
        return [ids[place] for place in places]
    found = _PAIRS.search(attributes)
    if found:  # a permutation ends with its slowest pair: the one farthest apart
        pairs = [numbers(pair) for pair in re.findall(r"\{([\d,]+)\}", found.group(1))]
        return list(max(pairs, key=lambda pair: abs(pair[0] - pair[1]), default=(0,)))
    return list(range(n_devices))


def axis_of(members: Iterable[int], layout: Layout) -> str:
    """The mesh axes along which devices differ, such as "tensor" or "data_fsdp"; "self" of one device."""
    return _crossed(np.fromiter(members, int)[None], layout)


def axis_of_collective(attributes: str, layout: Layout) -> str:
    """The mesh axes that a collective crosses; a permutation's are those of all its pairs."""
    pairs = _PAIRS.search(attributes)
    if pairs:
        return _crossed(np.array(numbers(re.sub(r"[{}]", "", pairs[1])), int).reshape(-1, 2), layout)
    return axis_of(replica_group(attributes, layout.n_devices), layout)


def _crossed(groups: np.ndarray, layout: Layout) -> str:
    places = np.unravel_index(groups, layout.sizes)
    return "_".join(a for a, place in zip(AXES, places, strict=True) if (place != place[:, :1]).any()) or "self"


def _iota(dims: tuple[int, ...], turn: tuple[int, ...]) -> list[int]:
    """arange(prod(dims)).reshape(dims).transpose(turn), flat."""
    return np.arange(math.prod(dims)).reshape(dims).transpose(turn).ravel().tolist()


def _along(sizes: dict[str, int], chosen: list[tuple[str, str, str]]) -> list[int]:
    """Places of a mesh along axes. Of an axis that is split, `(p)s` is the part of size s below parts of size p."""
    strides, stride = {}, 1
    for name in reversed(sizes):
        strides[name] = stride
        stride *= sizes[name]
    ids = [0]
    for name, above, size in chosen:
        n = int(size or sizes[name])
        step = strides[name] * sizes[name] // (int(above or 1) * n)
        ids = [i + k * step for i in ids for k in range(n)]
    return ids


def numbers(text: str | None) -> tuple[int, ...]:
    """The whole numbers of a list such as "1,128"."""
    return tuple(int(n) for n in (text or "").split(",") if n.strip())
