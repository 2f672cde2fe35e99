"""Which devices a program may look for, those attached or none; and where what was compiled for them is kept."""

import glob
import os

import jax

from experiments.data import default_cache

_DRIVER_FILES = ("/dev/nvidiactl", "/dev/accel*", "/dev/vfio/*", "/dev/kfd", "/dev/dxg")
"""What a driver leaves: NVIDIA, TPU (two kinds), AMD, and GPUs under Windows' Linux."""


def look_for_what_is_there() -> None:
    """Where no accelerator's driver is, run on the CPU, unless JAX_PLATFORMS says otherwise.

    The plugins of the deviceless extra can compile but not run; left to itself JAX would try to
    start them and print what they lack."""
    if "JAX_PLATFORMS" not in os.environ and not any(glob.glob(pattern) for pattern in _DRIVER_FILES):
        hide_all()
    keep_what_is_compiled()


def keep_what_is_compiled() -> None:
    """A second start compiles nothing: programs are kept in the cache's folder, unless JAX was told where, or not to
    (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE=false)."""
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(default_cache() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def keep_nothing() -> None:
    """For who listens to the compiler: of what is only read it says nothing. To be asked before anything compiles."""
    jax.config.update("jax_enable_compilation_cache", False)


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
