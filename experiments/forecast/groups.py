"""Which devices a collective joins, in every syntax that XLA prints."""

import math
import re

import numpy as np


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
    found = re.search(r"source_target_pairs=\"?\{((?:\{\d+,\d+\},?)*)\}", attributes)
    if found:  # a permutation ends with its slowest pair: the one farthest apart
        pairs = [numbers(pair) for pair in re.findall(r"\{([\d,]+)\}", found.group(1))]
        return list(max(pairs, key=lambda pair: abs(pair[0] - pair[1]), default=()))
    return list(range(n_devices))


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
