"""Seconds that one device needs for a piece of work: matrix products, attention, memory traffic, launches.

Shared by the simulator, which asks for every kernel of a schedule, and by whatever forecasts without one.
Needs no compiled module; what was asked once is remembered.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float

from experiments.forecast import constants, products
from experiments.forecast.kernels import Product
from experiments.forecast.network import fact
from experiments.hardware import Device
from transformer.errors import RequestError

LAUNCH_S = {
    "gpu": constants.GPU_LAUNCH_S.value,
    "tpu": constants.TPU_LAUNCH_S.value,
    "cpu": constants.CPU_LAUNCH_S.value,
}
"""Least seconds from one kernel to the next, where none is measured."""

Numbers = Float[np.ndarray, "..."]


@dataclass(frozen=True)
class Rates:
    """How fast a device works. `sustained`: as amid a training run, with the board at its power limit and its clocks
    down; otherwise each kernel alone on a cool board, as benchmarks of kernels print it."""

    device: Device
    sustained: bool = True

    def product_s(self, product: Product) -> float:
        """Seconds of a matrix product alone."""
        return _product_s(self, product)

    def product_in_step_s(self, product: Product) -> float:
        """Seconds of a matrix product between the other kernels of a training step."""
        return self.product_s(product) * (constants.IN_STEP.value if self.device.platform == "gpu" else 1.0)

    def products_s(
        self, m: Numbers, n: Numbers, k: Numbers, batch: Numbers | int = 1, dtype: str = "bf16", turned: bool = False
    ) -> Numbers:
        """Seconds of each of many products, whose sizes are arrays that broadcast."""
        sizes = [np.asarray(size, float) for size in np.broadcast_arrays(m, n, k, batch)]
        known = self._known(dtype)
        shapes = products.Shapes(*sizes)
        peak = self.peak(dtype)
        return products.seconds(self.device, shapes, known, peak, sustained=self.sustained, turned=turned)

    def attention_s(
        self, flops: float, dtype: str = "bf16", *, head: int = 128, length: int | None = None,
        causal: bool = True, backward: bool | None = None,
    ) -> float:  # fmt: skip
        """Seconds of a fused attention kernel that multiplies so much.

        `head`: size of a head. `length`: queries of a sequence, None for so many that blocks do not matter.
        `backward`: None for a forward and its backward together (two products and five).

        A score costs an exponential as well as products: with few FLOPs a score (small heads) the special function
        units limit. The parts add up, for the kernels overlap them in part only.
        """
        peak, efficiency = self.peak(dtype), fact(self.device, "attention_efficiency")
        if self.device.sm_count is None or self.device.clock_hz is None:
            return flops / (peak * efficiency)
        exp_per_s = constants.EXP_PER_CYCLE.value * self.device.sm_count * self.device.clock_hz
        forward, gradient = (2, efficiency), (5, efficiency * constants.ATTENTION_GRADIENT.value)
        kernels = [forward, gradient] if backward is None else [gradient if backward else forward]
        flops_per_product = flops / sum(n for n, _ in kernels)
        seconds = sum(
            flops_per_product / reached * (n_products / peak + 1 / (2 * head * exp_per_s))
            for n_products, reached in kernels
        )
        block = constants.ATTENTION_BLOCK.value
        if length is not None:
            seconds *= (length + block) / length if causal else np.ceil(length / block) * block / length
        return float(seconds)

    def memory_s(self, n_bytes: float) -> float:
        """Seconds to read and write so many bytes. What fits into half of L2 was left there by the kernel before;
        of what is larger than L2 nothing is left by the time it is read again."""
        device = self.device
        bytes_per_s = fact(device, "hbm_bytes_per_s") * fact(device, "memory_efficiency")
        seconds = n_bytes / bytes_per_s
        near_bytes_per_s = self._l2_bytes_per_s
        if device.l2_bytes and near_bytes_per_s > bytes_per_s:
            hit = max(0.0, min(n_bytes, device.l2_bytes - n_bytes))
            seconds -= hit * (1 / bytes_per_s - 1 / near_bytes_per_s)
        return seconds

    def operations_s(self, elements: Mapping[str, float]) -> float:
        """Seconds of what is computed beside products, by class (`operations.py`). A core does one after the other. 0
        where no class was measured: on accelerators memory limits it all."""
        known = self.device.operation_s
        return sum(n * known.get(of, 0.0) for of, n in elements.items())

    def fresh_s(self, n_bytes: float) -> float:
        """Seconds until the operating system has given so much memory that nothing has touched: pages are mapped and
        zeroed one by one. 0 where it is not measured: accelerators keep theirs."""
        rate = self.device.fresh_bytes_per_s
        return n_bytes / rate if rate and n_bytes > constants.KEPT_BYTES.value else 0.0

    @property
    def _l2_bytes_per_s(self) -> float:
        device = self.device
        if device.l2_bytes_per_s is not None:
            return device.l2_bytes_per_s
        return constants.L2_BYTES_PER_CYCLE.value * (device.sm_count or 0) * (device.clock_hz or 0.0)

    def cycles_s(self, cycles: float) -> float:
        """Seconds of what the TPU compiler estimates to take so many cycles."""
        return constants.TPU_CYCLES.value * cycles / fact(self.device, "clock_hz")

    def host_s(self, n_bytes: float) -> float:
        """Seconds to bring so many bytes to the host's memory, or back."""
        return n_bytes / (fact(self.device, "host_bytes_per_s") * fact(self.device, "link_efficiency"))

    @property
    def launch_s(self) -> float:
        """Least seconds from one kernel to the next, as XLA launches them: queued, or in a CUDA graph."""
        return LAUNCH_S[self.device.platform] if self.device.launch_s is None else self.device.launch_s

    def peak(self, dtype: str) -> float:
        """Dense FLOP/s of products of `dtype` as XLA runs them by default. Volta has float16 where others have
        bfloat16; float32 is TF32 on NVIDIA (half the bfloat16 rate where no rate is published, as it is
        wherever one is) and one bfloat16 pass on TPUs. RequestError where nothing is known."""
        known = self.device.peak_flops_per_s
        name = self._known(dtype)
        if name in known:
            return known[name]
        if name == "tf32" and "bf16" in known and self.device.platform != "cpu":
            return known["bf16"] / (2 if self.device.platform == "gpu" else 1)
        raise RequestError(f"{self.device.slug} has no peak rate for {dtype}: known are {', '.join(sorted(known))}")

    def _known(self, dtype: str) -> str:
        """A type as facts name it: the first of its names that the device has a rate for."""
        names = _NAMES.get(dtype, (dtype,))
        return next((name for name in names if name in self.device.peak_flops_per_s), names[0])


@cache
def _product_s(rates: Rates, product: Product) -> float:
    sizes = (np.array(size) for size in product[:4])
    return float(rates.products_s(*sizes, dtype=product.dtype, turned=product.turned))


_NAMES: Mapping[str, tuple[str, ...]] = {
    "bf16": ("bf16", "fp16"),
    "f16": ("fp16", "bf16"),
    "f32": ("tf32", "f32"),
    "f8e4m3fn": ("fp8",), "f8e5m2": ("fp8",), "s8": ("int8",),
}  # fmt: skip
