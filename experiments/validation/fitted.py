"""How many numbers behind these forecasts were fitted to measurements, and which."""

from typing import Any

from experiments.forecast import constants, interval
from experiments.forecast.closed_form.practice import KERNEL_SPEED
from experiments.validation.frameworks import ASYNC_TENSOR, EAGER_HOST_S

ON_TABLES = ("IN_STEP", "TPU_CYCLES", "DCN_EFFICIENCY", "STEP_VARIATION")
"""Of the model's constants, those whose evidence is step times of training runs."""


def fitted(ranges: interval.Backtests) -> dict[str, Any]:
    """`constants`, how many; `on_tables`, how many rest on step times of published runs; and each with its value.

    Counts numbers, not names. What was read in a source or counted by hand is none; fractions that a device reaches
    are its facts (hardware.toml).
    """
    shared = [
        {"name": name, "value": one.value, "on_tables": name in ON_TABLES}
        for name, one in constants.all_of_them().items()
        if one.is_fitted
    ]
    speeds = {
        f"KERNEL_SPEED {version} {generation}": speed
        for version, both in KERNEL_SPEED.items()
        for generation, speed in zip(("before Hopper", "on Hopper"), both, strict=True)
        if speed != 1.0
    }
    own = speeds | {
        "ASYNC_TENSOR": ASYNC_TENSOR,
        "EAGER_HOST_S over EAGER_LAUNCH_S": EAGER_HOST_S / constants.EAGER_LAUNCH_S.value,
        "quantile of the ranges": ranges.made["quantile"],
    }
    names = [*shared, *({"name": name, "value": value, "on_tables": True} for name, value in own.items())]
    return {"constants": len(names), "on_tables": sum(one["on_tables"] for one in names), "names": names}
