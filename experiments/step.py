"""The train step: one pure function, jit-compiled with shardings. The same object is run here and
compiled for clusters that are not here."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from transformer.attention import Backend
from transformer.config import ModelConfig, Precision, Remat
from transformer.models import Decoder, apply, decoder_params, init
from transformer.params import ParamTree, map_params
from transformer.sharding import ACTIVATION_RULES, OnMesh, param_shardings, spec


def _pipelined(*collectives: str) -> dict[str, Any]:
    """Options that move collectives of a loop's next or last iteration behind the compute of this one."""
    if jax.__version_info__ >= PIPELINE_MODES:
        return {f"xla_gpu_pipeline_{name}": "COLLECTIVE_PIPELINING_MODE_ON" for name in collectives}
    return {f"xla_gpu_enable_pipelined_{name}": True for name in collectives}


PIPELINE_MODES = (0, 11, 1)
"""The JAX whose XLA has three modes of pipelining where there was a switch."""

COMPILER_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    # Schedule communication behind compute; gather the next layer's weights and scatter the last
    # layer's gradients while this layer computes.
    "gpu": {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        **_pipelined("all_gather", "reduce_scatter", "all_reduce"),
    },
    "tpu": {},
    "cpu": {},
}
"""The XLA flags of every run and every forecast, by platform."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay to a tenth, gradients clipped by global norm."""

    learning_rate: float = 3e-4
    warmup_steps: int = 100
    total_steps: int = 10_000
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def make(self, table: ParamTree) -> optax.GradientTransformation:
        """The schedule reaches its peak after `warmup_steps`, and a tenth of it at `total_steps`.

        Matrices decay, norms and biases do not. Every matrix has the residual stream as one of its sides;
        the number of dims would not tell, as heads and stacked layers give vectors several.
        """
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, self.warmup_steps, max(self.total_steps, self.warmup_steps + 1),
            end_value=self.learning_rate / 10,
        )  # fmt: skip
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.adamw(
                schedule, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay,
                mask=map_params(lambda p: "embed" in p.dims, table),
            ),
        )  # fmt: skip


class TrainState(NamedTuple):
    """All that a step changes and a checkpoint keeps."""

    step: Any  # int32 scalar
    params: Any  # nested dicts as `decoder_params` describes
    opt_state: Any  # optax's


Batch = Mapping[str, Int[Array, "B L"]]  # "inputs" and "targets", the next tokens


def platform_of(device: jax.Device) -> str:
    """ "cpu", "gpu" or "tpu", by whatever name its maker's plugin goes."""
    return "gpu" if device.platform in ("cuda", "rocm") else str(device.platform)


def cross_entropy(logits: Float[Array, "B L V"], targets: Int[Array, "B L"]) -> Float[Array, ""]:
    """Mean over tokens of -log softmax(logits)[target], in nats.

    The target's logit is picked by comparison, not by index: an index into a split vocabulary would
    gather the logits, a comparison is local and fuses.
    """
    hit = jnp.arange(logits.shape[-1])[None, None] == targets[..., None]
    target_logits = jnp.where(hit, logits, 0).sum(-1)
    return (jax.nn.logsumexp(logits, axis=-1) - target_logits).mean()


@dataclass(frozen=True, kw_only=True)
class TrainStep:
    """A model's step on a mesh. `init` and `step` are jitted; the rest describes what they take.

    A global batch of `microbatches * b` sequences is worked off in `microbatches` parts whose
    gradients add up in float32.
    """

    config: ModelConfig
    mesh: Mesh
    optimizer: OptimizerConfig = OptimizerConfig()
    remat: Remat = "none"
    precision: Precision = "bf16"
    backend: Backend = "xla"
    microbatches: int = 1

    @property
    def platform(self) -> str:
        """ "cpu", "gpu" or "tpu": of the mesh, be it attached or not."""
        return platform_of(self.mesh.devices.flat[0])

    @cached_property
    def table(self) -> ParamTree:
        return decoder_params(self.config)

    @cached_property
    def model(self) -> Decoder:
        return Decoder(self.config, self.backend, self.remat, OnMesh(self.mesh))

    @cached_property
    def _adamw(self) -> optax.GradientTransformation:
        return self.optimizer.make(self.table)

    @cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state, nothing allocated."""
        params = map_params(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), self.table)
        shapes = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(self._adamw.init, params))

        def place(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

        return jax.tree.map(place, shapes, self._state_shardings(shapes))

    def _state_shardings(self, shapes: TrainState) -> TrainState:
        replicated = NamedSharding(self.mesh, PartitionSpec())
        params = param_shardings(self.table, self.mesh)
        moments = optax.tree.map_params(
            self._adamw, lambda _, sharding: sharding, shapes.opt_state, params,
            transform_non_params=lambda _: replicated,
        )  # fmt: skip
        return TrainState(replicated, params, moments)

    @cached_property
    def state_shardings(self) -> TrainState:
        """Where each array of the state lives."""
        return jax.tree.map(lambda a: a.sharding, self.abstract_state)

    @cached_property
    def batch_sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, spec(("batch", "length"), ACTIVATION_RULES))

    def abstract_batch(self, global_batch_seqs: int, seq_len: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a batch of `global_batch_seqs` sequences."""
        tokens = jax.ShapeDtypeStruct((global_batch_seqs, seq_len), jnp.int32, sharding=self.batch_sharding)
        return {"inputs": tokens, "targets": tokens}

    def local_rows(self, global_batch_seqs: int, seq_len: int) -> slice:
        """The rows of a global batch that this process must bring: from the first to the last that it holds."""
        places = self.batch_sharding.addressable_devices_indices_map((global_batch_seqs, seq_len)).values()
        bounds = [place[0].indices(global_batch_seqs)[:2] for place in places if place is not None]
        return slice(min(low for low, _ in bounds), max(high for _, high in bounds))

    def place(self, rows: Mapping[str, np.ndarray], global_batch_seqs: int) -> dict[str, Array]:
        """The global batch on the mesh, from the rows that `local_rows` named."""

        def array(values: np.ndarray) -> Array:
            shape = (global_batch_seqs, values.shape[1])
            first = self.local_rows(*shape).start

            def part(index: Any) -> np.ndarray:  # a slice per dim
                low, high, _ = index[0].indices(global_batch_seqs)
                return values[low - first : high - first, index[1]]

            return jax.make_array_from_callback(shape, self.batch_sharding, part)

        return {name: array(values) for name, values in rows.items()}

    @cached_property
    def init(self) -> Any:
        """jitted: key -> TrainState, each array made where it lives."""

        def make(key: Array) -> TrainState:
            params = init(dataclasses.replace(self.model, remat="none"), key)
            return TrainState(jnp.zeros((), jnp.int32), params, self._adamw.init(params))

        return jax.jit(make, out_shardings=self.state_shardings)

    @cached_property
    def step(self) -> Any:
        """jitted: (state, batch) -> (state, {"loss", "grad_norm"}); the old state's memory is reused."""
        return jax.jit(
            self._step,
            in_shardings=(self.state_shardings, self.batch_sharding),
            out_shardings=(self.state_shardings, NamedSharding(self.mesh, PartitionSpec())),
            donate_argnums=0,
            compiler_options=dict(COMPILER_OPTIONS[self.platform]),
        )

    @cached_property
    def loss(self) -> Any:
        """jitted: (params, batch) -> mean loss in nats per token."""
        return jax.jit(self.loss_of, in_shardings=(self.state_shardings.params, self.batch_sharding))

    def loss_of(self, params: Any, batch: Batch) -> Float[Array, ""]:
        """Mean loss of a batch. Parameters are cast once, so that what travels is of compute width."""
        if self.precision == "bf16":
            params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        return cross_entropy(apply(self.model, params, batch["inputs"]), batch["targets"])

    def gradients(self, params: Any, batch: Batch) -> tuple[Float[Array, ""], Any]:
        """Loss and gradient of the mean loss over the whole batch, microbatch by microbatch."""
        if self.microbatches == 1:
            return jax.value_and_grad(self.loss_of)(params, batch)
        split = jax.tree.map(self._split, batch)

        def accumulate(total: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(self.loss_of)(params, part)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(accumulate, zero, split)
        return jax.tree.map(lambda t: t / self.microbatches, total)

    def _split(self, tokens: Int[Array, "B L"]) -> Int[Array, "M b L"]:
        """Every microbatch takes its part of every device's sequences, so that none has to move."""
        parts = tokens.reshape(-1, self.microbatches, tokens.shape[1]).swapaxes(0, 1)
        whole = PartitionSpec(None, *self.batch_sharding.spec)
        return jax.lax.with_sharding_constraint(parts, NamedSharding(self.mesh, whole))

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        loss, grads = self.gradients(state.params, batch)
        updates, opt_state = self._adamw.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state), metrics
