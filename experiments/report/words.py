"""Numbers as a reader says them. A number that is not known is a dash."""

from collections.abc import Callable
from typing import Any

import pandas as pd

DASH, TIMES = "\u2013", "\u00d7"


def known(write: Callable[[Any], str]) -> Callable[[Any], str]:
    """`write`, except for None and NaN."""
    return lambda value: DASH if value is None or pd.isna(value) else write(value)


@known
def count(n: float) -> str:
    """40960 -> '40,960'."""
    return f"{n:,.0f}"


@known
def short(n: float) -> str:
    """A tick label, within 5 %: 0.5, 64, 1k, 1.5k, 8k, 41k, 2M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            scaled = n / size
            return f"{scaled:.0f}{letter}" if abs(round(scaled) / scaled - 1) < 0.05 else f"{scaled:.1f}{letter}"
    return f"{n:g}"


@known
def amount(x: float) -> str:
    """Three digits and a magnitude: '12.3 k', '1.04 M', '98.3 B'."""
    for size, letter in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(x) >= 0.9995 * size:
            return _three_digits(x / size) + letter
    return _three_digits(x)


@known
def seconds(s: float) -> str:
    """4.21 -> '4.21 s', 0.0123 -> '12.3 ms'."""
    for size, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if s >= 0.9995 * size:
            return f"{_three_digits(s / size)} {unit}"
    return f"{_three_digits(s / 1e-6)} µs"


@known
def days(d: float) -> str:
    """A duration in days, or in hours, minutes or seconds where that would be a fraction."""
    for size, unit in ((1, "days"), (1 / 24, "h"), (1 / 1440, "min")):
        if d >= 2 * size:
            return f"{_three_digits(d / size)} {unit}"
    return f"{_three_digits(d * 86400)} s"


@known
def usd(x: float) -> str:
    """'USD 0.214', 'USD 98,304', 'USD 12.4 M'."""
    if x >= 0.9995e6:
        return f"USD {amount(x)}"
    return f"USD {x:,.0f}" if x >= 1000 else f"USD {_three_digits(x)}"


@known
def percent(fraction: float) -> str:
    """0.413 -> '41.3 %'."""
    return f"{100 * fraction:.1f} %"


@known
def signed_percent(fraction: float) -> str:
    """0.083 -> '+8.3 %'."""
    return f"{100 * fraction:+.1f} %"


@known
def memory(b: float) -> str:
    """Bytes as GB of 10⁹ bytes, or MB of 10⁶."""
    return f"{_three_digits(b / 1e9)} GB" if b >= 1e9 else f"{_three_digits(b / 1e6)} MB"


def span(write: Callable[[Any], str], low: Any, high: Any) -> str:
    """'3.9 s to 4.5 s', or a dash if either end is not known or there is nothing between them."""
    ends = (write(low), write(high))
    return DASH if DASH in ends or low == high else " to ".join(ends)


def plural(n: int, noun: str) -> str:
    """2, 'rung' -> '2 rungs'."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _three_digits(x: float) -> str:
    magnitude = abs(x)
    return (
        f"{x:,.0f}"
        if magnitude >= 99.95
        else f"{x:.1f}"
        if magnitude >= 9.995
        else f"{x:.2f}"
        if magnitude >= 0.9995
        else f"{x:.3g}"
    )
