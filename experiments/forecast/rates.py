"""Seconds that one device needs for a piece of work: matrix products, attention, memory traffic, launches.

Shared by the simulator, which asks for every kernel of a schedule, and by whatever forecasts without one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from experiments.forecast.kernels import Product
from experiments.forecast.network import fact
from experiments.hardware import Device
from transformer.errors import RequestError

LAUNCH_S = {"gpu": 3e-6, "tpu": 0.5e-6, "cpu": 1e-6}
"""Least seconds from one kernel to the next. Own estimate: launch latency inside a CUDA graph or stream
of queued kernels; a TPU's sequencer between fusions."""


@dataclass(frozen=True)
class Rates:
    """How fast a device works."""

    device: Device

    def product_s(self, product: Product) -> float:
        """Seconds of arithmetic; the memory traffic of a large product hides behind it, that of a small one counts."""
        return product.flops / (self.peak(product.dtype) * fact(self.device, "matmul_efficiency"))

    def attention_s(self, flops: float, dtype: str = "bf16") -> float:
        """Seconds of a fused attention kernel that multiplies so much."""
        return flops / (self.peak(dtype) * fact(self.device, "attention_efficiency"))

    def memory_s(self, n_bytes: float) -> float:
        """Seconds to read and write so many bytes of device memory."""
        return n_bytes / (fact(self.device, "hbm_bytes_per_s") * fact(self.device, "memory_efficiency"))

    def host_s(self, n_bytes: float) -> float:
        """Seconds to bring so many bytes to the host's memory, or back."""
        return n_bytes / (fact(self.device, "host_bytes_per_s") * fact(self.device, "link_efficiency"))

    @property
    def launch_s(self) -> float:
        """Least seconds from one kernel to the next."""
        return LAUNCH_S[self.device.platform]

    def peak(self, dtype: str) -> float:
        """Dense FLOP/s of products of `dtype` as XLA runs them by default. Volta has float16 where others have
        bfloat16; float32 is TF32 on NVIDIA (half the bfloat16 rate where no rate is published, as it is
        wherever one is) and one bfloat16 pass on TPUs. RequestError where nothing is known."""
        known = self.device.peak_flops_per_s
        for name in _NAMES.get(dtype, (dtype,)):
            if name in known:
                return known[name]
        if dtype == "f32" and "bf16" in known and self.device.platform != "cpu":
            return known["bf16"] / (2 if self.device.platform == "gpu" else 1)
        raise RequestError(f"{self.device.slug} has no peak rate for {dtype}: known are {', '.join(sorted(known))}")


_NAMES: Mapping[str, tuple[str, ...]] = {
    "bf16": ("bf16", "fp16"),
    "f16": ("fp16", "bf16"),
    "f32": ("tf32", "f32"),
    "f8e4m3fn": ("fp8",), "f8e5m2": ("fp8",), "s8": ("int8",),
}  # fmt: skip
