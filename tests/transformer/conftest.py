"""What several tests of the model share."""

import zlib

import jax.numpy as jnp
import numpy as np
import pytest

from transformer.models import model_params
from transformer.params import Param


@pytest.fixture(scope="session")
def random_params():
    """(config, seed) -> parameters of a model, unlike fresh ones: biases and scales matter, experts differ, nothing is
    0. The same path has the same values in every model. Made in numpy, so that nothing compiles."""

    def values(path: str, param: Param, seed: int):
        rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
        x = rng.normal(size=param.shape) * 0.4
        return jnp.asarray(1 + x if path.endswith("scale") else x, jnp.float32)

    def make(config, seed=0):
        def walk(tree, path):
            if isinstance(tree, Param):
                return values(path, tree, seed)
            return {name: walk(part, f"{path}/{name}") for name, part in tree.items()}

        return walk(model_params(config), "")

    return make
