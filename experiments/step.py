"""The train step: one pure function, jit-compiled with shardings. The same object is run here and
compiled for clusters that are not here."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from experiments.compiler import COMPILER_OPTIONS
from experiments.gradients import Gradients
from experiments.objectives import Objective
from experiments.optimizer import OptimizerConfig, added
from transformer.backends import Chip
from transformer.config import ModelConfig, Weights
from transformer.experts import rebalanced
from transformer.models import Batch, apply, check_batch, init
from transformer.params import dtype_of, map_params
from transformer.placement import OnMesh
from transformer.sharding import ACTIVATION_RULES, param_shardings, spec

HOST_MEMORY = "pinned_host"
"""JAX's kind of the host's memory that a device reads and writes by itself."""


class TrainState(NamedTuple):
    """All that a step changes and a checkpoint keeps."""

    step: Any  # int32 scalar
    params: Any  # nested dicts as `model_params` describes
    opt_state: Any  # optax's


def chip_of(device: jax.Device) -> Chip:
    """What a device, attached or not, is to the code that chooses kernels: by whatever name its maker's plugin goes."""
    platform = "gpu" if device.platform in ("cuda", "rocm") else str(device.platform)
    capability = str(getattr(device, "compute_capability", ""))  # "9.0" of NVIDIA's, a name of AMD's
    found = re.fullmatch(r"(\d+)\.(\d+)", capability)
    return Chip(platform, (int(found[1]), int(found[2])) if found else None)


def objective_of(config: ModelConfig) -> Objective:
    """What a model is trained to predict: the next token, the hidden ones, what follows a prefix, a translation."""
    if config.family == "decoder":
        return "prefix" if config.prefix else "causal"
    return "masked" if config.family == "encoder" else "pairs"


_ARRAYS: Mapping[Objective, tuple[str, ...]] = {
    "causal": ("inputs", "targets", "weights"),
    "masked": ("inputs", "targets", "weights"),
    "prefix": ("inputs", "targets", "weights", "prefix"),
    "pairs": (
        "inputs", "targets", "weights", "segments", "positions", "source", "source_segments", "source_positions",
    ),
}  # fmt: skip
"""What a batch has, all of them [B, L] but for `prefix` [B]: `models.py` and `data.py` say what they are."""


@dataclass(frozen=True, kw_only=True)
class TrainStep(Gradients):
    """A model's step on a mesh. `init` and `step` are jitted; the rest describes what they take."""

    optimizer: OptimizerConfig = OptimizerConfig()
    weights: Weights = "f32"  # of parameters between steps; bf16: rounded by chance
    offload_optimizer: bool = False  # AdamW's moments lie in the host's memory

    @property
    def platform(self) -> str:
        """ "cpu", "gpu" or "tpu": of the mesh, be it attached or not."""
        return chip_of(self.mesh.devices.flat[0]).platform

    @cached_property
    def _adamw(self) -> optax.GradientTransformation:
        return self.optimizer.make(self.table)

    @cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the state. The optimizer's moments are split like their parameters."""
        shapes = self._shapes
        replicated = NamedSharding(self.mesh, PartitionSpec())
        places = param_shardings(self.table, self.mesh)
        moments = optax.tree.map_params(
            self._adamw, lambda _, sharding: sharding, shapes.opt_state, places,
            transform_non_params=lambda _: replicated,
        )  # fmt: skip

        def placed(a: Any, sharding: NamedSharding, in_host: bool) -> jax.ShapeDtypeStruct:
            sharding = sharding.with_memory_kind(HOST_MEMORY) if in_host else sharding
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

        return jax.tree.map(placed, shapes, TrainState(replicated, places, moments), self.in_host)

    @cached_property
    def _shapes(self) -> TrainState:
        return jax.eval_shape(self._fresh, jax.random.key(0))

    @cached_property
    def in_host(self) -> TrainState:
        """Of each array of the state whether it lies in the host's memory: of the optimizer's, moments can."""
        moments = optax.tree.map_params(
            self._adamw, lambda _: self.offload_optimizer, self._shapes.opt_state,
            transform_non_params=lambda _: False,
        )  # fmt: skip
        return TrainState(False, map_params(lambda _: False, self.table), moments)

    @cached_property
    def state_shardings(self) -> TrainState:
        """Where each array of the state lives."""
        return jax.tree.map(lambda a: a.sharding, self.abstract_state)

    @cached_property
    def batch_shardings(self) -> dict[str, NamedSharding]:
        """Where each array of a batch lives."""
        return {name: a.sharding for name, a in self.abstract_batch(1, 1).items()}

    def abstract_batch(self, global_batch_seqs: int, seq_len: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a batch of `global_batch_seqs` sequences; of pairs, source and target have `seq_len` each."""

        def array(name: str) -> jax.ShapeDtypeStruct:
            shape, dims = (global_batch_seqs, seq_len), ("batch", "length")
            if name == "prefix":
                shape, dims = shape[:1], dims[:1]
            sharding = NamedSharding(self.mesh, spec(dims, ACTIVATION_RULES))
            return jax.ShapeDtypeStruct(shape, jnp.float32 if name == "weights" else jnp.int32, sharding=sharding)

        return {name: array(name) for name in _ARRAYS[objective_of(self.config)]}

    def local_rows(self, global_batch_seqs: int) -> slice:
        """The rows of a global batch that this process must bring: from the first to the last that it holds."""
        sharding = NamedSharding(self.mesh, spec(("batch",), ACTIVATION_RULES))
        places = sharding.addressable_devices_indices_map((global_batch_seqs,)).values()
        bounds = [place[0].indices(global_batch_seqs)[:2] for place in places if place is not None]
        return slice(min(low for low, _ in bounds), max(high for _, high in bounds))

    def place(self, rows: Mapping[str, np.ndarray], global_batch_seqs: int) -> dict[str, Array]:
        """The global batch on the mesh, from the rows that `local_rows` named. RequestError if the model cannot
        read them."""
        check_batch(self.config, rows)
        first = self.local_rows(global_batch_seqs).start

        def array(name: str, values: np.ndarray) -> Array:
            def part(index: Any) -> np.ndarray:  # a slice per dim
                low, high, _ = index[0].indices(global_batch_seqs)
                return values[(slice(low - first, high - first), *index[1:])]

            shape = (global_batch_seqs, *values.shape[1:])
            return jax.make_array_from_callback(shape, self.batch_shardings[name], part)

        return {name: array(name, rows[name]) for name in self.batch_shardings}

    @cached_property
    def init(self) -> Any:
        """jitted: key -> TrainState, each array made where it lives."""
        return jax.jit(self._fresh, out_shardings=self.state_shardings)

    def _fresh(self, key: Array) -> TrainState:
        """Moments are float32 whatever the parameters are: of squares 16 bit would lose the small."""
        params = init(self.config, key)
        kept = jax.tree_util.tree_map_with_path(lambda at, p: p.astype(dtype_of(at[-1].key, self.weights)), params)
        return TrainState(jnp.zeros((), jnp.int32), kept, self._adamw.init(params))

    @cached_property
    def step(self) -> Any:
        """jitted: (state, batch) -> (state, {"loss", "grad_norm"}); the old state's memory is reused."""
        return jax.jit(
            self._step,
            in_shardings=(self.state_shardings, self.batch_shardings),
            out_shardings=(self.state_shardings, NamedSharding(self.mesh, PartitionSpec())),
            donate_argnums=0,
            compiler_options=dict(COMPILER_OPTIONS[self.platform]),
        )

    @cached_property
    def loss(self) -> Any:
        """jitted: (params, batch) -> loss in nats summed over tokens by weight, and the sum of the weights.
        Without dropout."""

        def loss(params: Any, batch: Batch) -> tuple[Array, Array]:
            model = self.model.clone(train=False, shard=OnMesh(self.mesh, ring=self.ring))
            batch = self._balanced(batch)
            out = apply(model, self._cast(params), batch)
            return self._cross_entropy(out, batch, model.shard), batch["weights"].sum()

        return jax.jit(loss, in_shardings=(self.state_shardings.params, self.batch_shardings))

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        return self.with_gradients(state, batch)[:2]

    def _moved(self, opt_state: Any, to: jax.memory.Space) -> Any:
        """What lies in the host's memory, fetched or brought back. An array by itself: each is needed for a moment."""
        return jax.tree.map(lambda a, hosted: jax.device_put(a, to) if hosted else a, opt_state, self.in_host.opt_state)

    def with_gradients(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array], Any]:
        """The state after a step, what is told of it, and the gradients that it took."""
        found = self.gradients(state.params, batch, state.step)
        opt_state = state.opt_state
        if self.offload_optimizer:  # not fetched before there is room: when the backward pass is through
            opt_state, found = jax.lax.optimization_barrier((opt_state, found))
        opt_state = self._moved(opt_state, jax.memory.Space.Device)
        with jax.named_scope("optimizer"):
            wide = jax.tree.map(lambda p: p.astype(jnp.float32), state.params)
            updates, opt_state = self._adamw.update(found.grads, opt_state, wide)
            params = added(state.params, updates, jax.random.fold_in(jax.random.key(self.seed), state.step))
        opt_state = self._moved(opt_state, jax.memory.Space.Host)
        if self.config.balance_rate:
            params = rebalanced(params, found.loads, self.config.balance_rate)
        metrics = {"loss": found.loss, "grad_norm": optax.tree.norm(found.grads)}
        return TrainState(state.step + 1, params, opt_state), metrics, found.grads
