"""Checks of one entry of a facts file: its keys, its type, its range. Each raises RequestError
that names the place, what stands there and what was expected."""

import math
import types
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

from transformer.errors import RequestError, nearest

_FRACTIONS = ("matmul", "memory", "link", "attention", "node_loss_share")  # the first four of [efficiency.*]
_MAY_BE_NONE = ("host_share", "checkpoint_stall_s", "slow_nodes_per_node_day", "slow_step_share")


def table(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(f"{place} = {value!r}: expected a table")
    return value


def check_keys(entry: Any, allowed: Iterable[str], place: str, word: str = "key") -> None:
    if unknown := sorted(table(entry, place).keys() - set(allowed)):
        raise RequestError(f"{place}: unknown {word} {unknown[0]!r}, {nearest(unknown[0], allowed)}")


def checked(value: Any, hint: Any, place: str) -> Any:
    """`value`, if it is of the annotated type and, as a number, in range for its name."""
    name = place.rsplit(maxsplit=1)[-1]
    if get_origin(hint) is types.UnionType:
        hint = get_args(hint)[0]  # `float | None`
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise RequestError(f"{place} = {value!r}: {nearest(str(value), get_args(hint))}")
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise RequestError(f"{place} = {value!r}: expected a list of texts")
        return tuple(value)
    kinds = {
        float: ((int, float), "a number"),
        int: (int, "a whole number"),
        str: (str, "a text"),
        list: (list, "a list"),
    }
    kind, words = kinds[hint]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise RequestError(f"{place} = {value!r}: expected {words}")
    if hint in (int, float):
        _check_range(value, name, place)
    return value


def _check_range(value: float, name: str, place: str) -> None:
    above, most, words = 0.0, math.inf, "a number above 0"
    if name in _FRACTIONS or name.endswith("_efficiency"):
        most, words = 1.0, "a fraction above 0 and at most 1"
    elif name in ("oversubscription", "pue"):
        above, words = math.nextafter(1.0, 0.0), "at least 1"
    elif name in _MAY_BE_NONE or name.endswith(("_latency_s", "_launch_s")):
        above, words = -math.ulp(0.0), "at least 0"
    if not (above < value <= most and math.isfinite(value)):
        raise RequestError(f"{place} = {value!r}: expected {words}")
