"""The train step: one pure function, jit-compiled with shardings. The same object is run here and
compiled for clusters that are not here."""

import math
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
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from experiments.compiler import COMPILER_OPTIONS
from experiments.objectives import Objective
from experiments.optimizer import OptimizerConfig
from transformer.backends import Chip
from transformer.config import Backend, ModelConfig, Precision, Remat
from transformer.experts import rebalanced
from transformer.losses import balance, cross_entropy
from transformer.models import Batch, Output, Transformer, apply, check_batch, init, model_params
from transformer.params import ParamTree, map_params
from transformer.pipeline import Pipeline, in_order
from transformer.pipeline import gradients as pipelined
from transformer.sharding import (
    ACTIVATION_RULES,
    REPLICAS,
    OnMesh,
    Shard,
    context_order,
    gathered,
    param_shardings,
    spec,
)
from transformer.stages import from_stages, in_stages, leading, shared_out, to_stages


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


class Gradient(NamedTuple):
    """Of one batch."""

    loss: Float[Array, ""]  # mean over tokens, by weight, in nats
    grads: Any  # of the loss and what is added to it, shaped as the parameters
    loads: Any  # how the choices of experts fell


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
    zero: int = 3  # as in Layout
    ring: bool = False  # as in Layout
    repeats: int = 1  # as in Layout
    seed: int = 0  # of dropout

    @property
    def platform(self) -> str:
        """ "cpu", "gpu" or "tpu": of the mesh, be it attached or not."""
        return chip_of(self.mesh.devices.flat[0]).platform

    @cached_property
    def table(self) -> ParamTree:
        return model_params(self.config)

    @property
    def shard(self) -> OnMesh:
        """Where the model's tensors go. Below ZeRO 2 every group of devices that shares sequences works by itself,
        and gradients add up where they are made until all microbatches are through."""
        return OnMesh(self.mesh, of_one=self.zero < 2, ring=self.ring)

    @cached_property
    def model(self) -> Transformer:
        return Transformer(
            self.config, backend=self.backend, remat=self.remat, shard=self.shard,
            train=self.config.dropout > 0,
        )  # fmt: skip

    @cached_property
    def _adamw(self) -> optax.GradientTransformation:
        return self.optimizer.make(self.table)

    @cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the state. The optimizer's moments are split like their parameters."""
        params = map_params(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), self.table)
        shapes = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(self._adamw.init, params))
        replicated = NamedSharding(self.mesh, PartitionSpec())
        places = param_shardings(self.table, self.mesh)
        moments = optax.tree.map_params(
            self._adamw, lambda _, sharding: sharding, shapes.opt_state, places,
            transform_non_params=lambda _: replicated,
        )  # fmt: skip
        return jax.tree.map(
            lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
            shapes, TrainState(replicated, places, moments),
        )  # fmt: skip

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

        def make(key: Array) -> TrainState:
            params = init(self.config, key)
            return TrainState(jnp.zeros((), jnp.int32), params, self._adamw.init(params))

        return jax.jit(make, out_shardings=self.state_shardings)

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

    def _cast(self, params: Any) -> Any:
        """Parameters are cast once and where they are, so that what travels is 16 bit. Routers choose in float32."""

        def cast(path: Any, p: Array) -> Array:
            return p if path[-1].key.endswith("_router") else p.astype(jnp.bfloat16)

        if self.precision != "bf16":
            return params
        made = jax.tree_util.tree_map_with_path(cast, params)
        return jax.lax.with_sharding_constraint(made, self.state_shardings.params)

    def _balanced(self, batch: Batch) -> Batch:
        """Positions in the order in which the context axis has them."""
        parts = self.mesh.shape["context"]
        if parts == 1:
            return batch
        return {
            name: a if a.ndim < 2 else jnp.take(a, context_order(a.shape[1], parts), axis=1)
            for name, a in batch.items()
        }

    def _cross_entropy(self, out: Output, batch: Batch, shard: Shard) -> Float[Array, ""]:
        return cross_entropy(out.x, out.head, batch["targets"], batch["weights"], config=self.config, shard=shard)

    def loss_of(self, params: Any, batch: Batch, total: Array, dropout: Array | None) -> tuple[Array, Any]:
        """What is made small by a part of a batch whose weights add up to `total`; its cross-entropy and loads."""
        out = apply(self.model, params, batch, dropout)
        loss = self._cross_entropy(out, batch, self.shard) / total
        return loss + self._added(out.loads), (loss, out.loads)

    def _added(self, loads: Any) -> Float[Array, ""]:
        """What a part of a batch adds to its loss for loads that are uneven."""
        return self.config.balance_loss * balance(loads) / (self.microbatches * self._groups)

    @property
    def _groups(self) -> int:
        """Groups of devices that work by themselves."""
        return math.prod(self.mesh.shape[axis] for axis in REPLICAS) if self.zero < 2 else 1

    def gradients(self, params: Any, batch: Batch, step: Any = 0) -> Gradient:
        """Loss and gradient of the mean loss over the whole batch, microbatch by microbatch."""
        total = jnp.maximum(batch["weights"].sum(), 1.0)
        key = jax.random.fold_in(jax.random.key(self.seed), step) if self.config.dropout else None
        params, batch = self._cast(params), self._balanced(batch)
        params = self._staged(params)
        if self.zero < 3:
            params = gathered(params, self.table, self.mesh)
        if self.zero < 2:
            return self._in_order(self._summed(*self._by_group(params, batch), total, key))
        return self._in_order(self._accumulated(params, batch, total, key))

    def _accumulated(self, params: Any, batch: Batch, total: Array, key: Array | None) -> Gradient:
        """Of one microbatch after another, added up in float32."""
        if self.mesh.shape["pipeline"] > 1:
            return self._in_stages(params, batch, total)

        def part(rows: Batch, i: Any) -> Gradient:
            drawn = None if key is None else jax.random.fold_in(key, i)
            (_, (loss, loads)), grads = jax.value_and_grad(self.loss_of, has_aux=True)(params, rows, total, drawn)
            return Gradient(loss, jax.tree.map(lambda g: g.astype(jnp.float32), grads), loads)

        if self.microbatches == 1:
            return part(batch, 0)

        def accumulate(sums: Gradient, numbered: tuple[Batch, Array]) -> tuple[Gradient, None]:
            return jax.tree.map(jnp.add, sums, part(*numbered)), None

        split = {name: self._split(array) for name, array in batch.items()}
        first = jax.tree.map(lambda a: a[0], split)
        zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(part, first, jnp.int32(0)))
        sums, _ = jax.lax.scan(accumulate, zero, (split, jnp.arange(self.microbatches)))
        return sums

    def _in_stages(self, params: Any, batch: Batch, total: Array) -> Gradient:
        """Of microbatches that pass through a pipeline."""
        stack, block, pipe = self._shared_out
        rows = {name: self._split(array) for name, array in batch.items()}
        outer = params | {stack: {name: p for name, p in params[stack].items() if name != block}}
        model = in_stages(self.model, self._added, lambda out, rows: self._cross_entropy(out, rows, self.shard) / total)
        stream, pull = None, None
        if self.config.blocks()[1:]:
            stream, pull = jax.vjp(lambda outer: leading(self.model, pipe.stages, outer, rows), outer)
        found = pipelined(model, outer, params[stack][block], rows, pipe, self.shard, stream)
        d_outer = found.outer
        if pull:
            d_outer = jax.tree.map(lambda g, before: g + before, d_outer, pull(found.stream)[0])
        grads = d_outer | {stack: d_outer[stack] | {block: found.layers}}
        return Gradient(found.loss, grads, {stack: {block: found.seen}} if found.seen else {})

    @property
    def _shared_out(self) -> tuple[str, str, Pipeline]:
        """The stack and the block in it whose repeats the stages share out, and how."""
        _, block = shared_out(self.config)
        stack = "encoder" if self.config.family == "encoder" else "decoder"
        pipe = Pipeline(self.mesh.shape["pipeline"], self.repeats, self.microbatches, block.repeats)
        return stack, f"block_{block.first}", pipe

    @cached_property
    def _staged_table(self) -> ParamTree:
        """Parameters as stages have them."""
        if self.mesh.shape["pipeline"] == 1:
            return self.table
        stack, block, pipe = self._shared_out
        layers: Any = map_params(lambda p: p._replace(shape=(pipe.room, *p.shape[1:])), self.table[stack][block])
        return {**self.table, stack: {**self.table[stack], block: layers}}

    def _staged(self, params: Any) -> Any:
        """Stored parameters with the layers stage by stage."""
        if self.mesh.shape["pipeline"] == 1:
            return params
        stack, block, pipe = self._shared_out
        layers = to_stages(params[stack][block], self._staged_table[stack][block], pipe, self.mesh)
        return params | {stack: params[stack] | {block: layers}}

    def _in_order(self, found: Gradient) -> Gradient:
        """Gradients of `_staged` parameters, as the parameters are stored."""
        if self.mesh.shape["pipeline"] == 1:
            return found
        stack, block, pipe = self._shared_out
        layers = from_stages(found.grads[stack][block], self.table[stack][block], pipe, self.mesh)
        grads = found.grads | {stack: found.grads[stack] | {block: layers}}
        return Gradient(found.loss, grads, jax.tree.map(lambda a: in_order(a, pipe), found.loads))

    def _by_group(self, params: Any, batch: Batch) -> tuple[Any, Batch]:
        """Parameters and rows of every group of devices, groups in front."""

        def own(p: Array) -> Array:
            return jnp.broadcast_to(p[None], (self._groups, *p.shape))

        return jax.tree.map(own, params), {n: a.reshape(self._groups, -1, *a.shape[1:]) for n, a in batch.items()}

    def _summed(self, params: Any, batch: Batch, total: Array, key: Array | None) -> Gradient:
        """Every group's gradient, added up once and where the optimizer wants it."""

        def of_group(params: Any, rows: Batch, group: Array) -> Gradient:
            return self._accumulated(params, rows, total, None if key is None else jax.random.fold_in(key, group))

        groups = jnp.arange(self._groups)
        found = jax.vmap(of_group, spmd_axis_name=REPLICAS)(params, batch, groups)
        sums = jax.tree.map(lambda a: a.sum(0), found)
        places = param_shardings(self._staged_table, self.mesh)
        return sums._replace(grads=jax.lax.with_sharding_constraint(sums.grads, places))

    def _split(self, array: Array) -> Array:
        """Every microbatch takes its part of every device's sequences, so that none has to move."""
        parts = array.reshape(-1, self.microbatches, *array.shape[1:]).swapaxes(0, 1)
        return self.shard.activation(parts, "channel", *("batch", "length")[: array.ndim])

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        return self.with_gradients(state, batch)[:2]

    def with_gradients(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array], Any]:
        """The state after a step, what is told of it, and the gradients that it took."""
        found = self.gradients(state.params, batch, state.step)
        updates, opt_state = self._adamw.update(found.grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        if self.config.balance_rate:
            params = rebalanced(params, found.loads, self.config.balance_rate)
        metrics = {"loss": found.loss, "grad_norm": optax.tree.norm(found.grads)}
        return TrainState(state.step + 1, params, opt_state), metrics, found.grads
