"""Which devices a program may look for: those attached, or none."""

import glob
import os

import jax

_DRIVER_FILES = ("/dev/nvidiactl", "/dev/accel*", "/dev/vfio/*", "/dev/kfd", "/dev/dxg")
"""What a driver leaves: NVIDIA, TPU (two kinds), AMD, and GPUs under Windows' Linux."""


def look_for_what_is_there() -> None:
    """Where no accelerator's driver is, run on the CPU, unless JAX_PLATFORMS says otherwise.

    The plugins of the deviceless extra can compile but not run; left to itself JAX would try to
    start them and print what they lack."""
    if "JAX_PLATFORMS" not in os.environ and not any(glob.glob(pattern) for pattern in _DRIVER_FILES):
        hide_all()


def hide_all() -> None:
    """Run on the CPU, whatever is attached: for programs that only compile.

    Of XLA's own log warnings are kept, which `diagnosis.compiler` reads: libtpu must be told to say them."""
    for name in ("TF_CPP_MIN_LOG_LEVEL", "TPU_MIN_LOG_LEVEL", "TPU_STDERR_LOG_LEVEL"):
        os.environ[name] = "1"  # JAX has set the first already, so a default would do nothing
    jax.config.update("jax_platforms", "cpu")


def at_least(n_devices: int) -> None:
    """Where only a CPU is attached, split it into so many virtual devices, unless JAX_NUM_CPU_DEVICES says otherwise.
    To be asked before JAX has looked."""
    on_cpu = jax.config.jax_platforms == "cpu"  # pyright: ignore[reportAttributeAccessIssue]
    if on_cpu and "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", n_devices)
