"""CPU, 8 virtual devices, shapes checked, everything sloppy an error. Set before JAX is imported."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Level 0 halves the time that tests spend compiling; sharding and its collectives are decided before it matters.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0")

# What is tested is compiled here and now.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import pytest
from jaxtyping import install_import_hook

# Every shape in a signature is checked at every call, from here on: in the modules that have arrays.
ARRAYS = (
    "transformer.masks",
    "transformer.positions",
    "transformer.attention",
    "transformer.backends",
    "transformer.kernels",
    "transformer.cudnn_calls",
    "transformer.blockwise",
    "transformer.chunkwise",
    "transformer.embedding",
    "transformer.dropless",
    "transformer.grouped",
    "transformer.feed_forward",
    "transformer.experts",
    "transformer.layers",
    "transformer.losses",
    "transformer.models",
    "transformer.decoding",
    "experiments.step",
    "experiments.gradients",
    "experiments.optimizer",
    "experiments.data",
    "experiments.objectives",
    "experiments.packing",
    "experiments.tokenizer",
)
install_import_hook(ARRAYS, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


@pytest.fixture(scope="session")
def eight_devices():
    """A test of sharding on one device would prove nothing, so too few is a failure and not a skip."""
    import jax

    if len(jax.devices()) < 8:
        pytest.fail(f"{len(jax.devices())} devices, 8 needed: JAX was imported before conftest set their number")
    return jax.devices()[:8]


@pytest.fixture
def strict_dtypes():
    """Mixed dtypes raise. Asked for by what is ours alone: optax raises a float to an integer step."""
    import jax

    with jax.numpy_dtype_promotion("strict"):
        yield
