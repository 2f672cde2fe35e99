"""What the compiled program sends against what its layout should send: by axis and kind, so that a tensor that is
silently replicated, or gathered twice, is told."""

from collections.abc import Mapping

from experiments.records import Record

TOLERANCE = 0.05
"""Of an axis' bytes: by so much measured and closed form may differ."""
SMALL = 0.01
"""Of all bytes of the step: less is not worth a line."""


def compared(measured: Mapping[str, float], closed: Mapping[str, float]) -> Record:
    """By "axis kind": bytes of the compiled program and in closed form; their ratio, null where none should be sent."""
    return {
        key: {"measured": got, "closed_form": want, "ratio": got / want if want else None}
        for key in sorted({*measured, *closed})
        if not key.startswith("self ")  # a permutation that moves nothing
        for got, want in [(measured.get(key, 0.0), closed.get(key, 0.0))]
    }


def small(found: Mapping[str, Mapping[str, float]]) -> float:
    """Bytes that are not worth a line."""
    return SMALL * sum(c["measured"] for c in found.values())


def off(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A line for every axis and kind whose bytes are not those of the closed form.

    >>> off(compared({"fsdp all-gather": 4e9}, {"fsdp all-gather": 2e9}))
    ['fsdp all-gather: 4.00 GB a step, where the layout needs 2.00']
    """
    least = small(found)
    return [
        f"{key}: {c['measured'] / 1e9:.2f} GB a step, where the layout needs {c['closed_form'] / 1e9:.2f}"
        for key, c in found.items()
        if abs(c["measured"] - c["closed_form"]) > max(least, TOLERANCE * c["closed_form"])
    ]
