"""The gradient of a batch on a mesh: parameters made ready, microbatches one after another, groups, stages."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float

from transformer.config import Backend, ExpertProducts, ModelConfig, Precision, Remat
from transformer.losses import balance, cross_entropy
from transformer.models import Batch, Output, Transformer, apply, model_params
from transformer.params import Param, ParamTree, map_params
from transformer.pipeline import Pipeline, in_order
from transformer.pipeline import gradients as pipelined
from transformer.placement import OnMesh, Shard, at, gathered
from transformer.sharding import REPLICAS, axes_of, context_order, param_spec
from transformer.stages import from_stages, in_stages, leading, shared_out, stack_of, to_stages


class Gradient(NamedTuple):
    """Of one batch."""

    loss: Float[Array, ""]  # mean over tokens, by weight, in nats
    grads: Any  # of the loss and what is added to it, shaped as the parameters
    loads: Any  # how the choices of experts fell


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """How the gradient of a model's loss is computed on a mesh.

    A global batch of `microbatches * b` sequences is worked off in `microbatches` parts whose
    gradients add up in float32.
    """

    config: ModelConfig
    mesh: Mesh
    remat: Remat = "none"
    precision: Precision = "bf16"
    backend: Backend = "xla"
    experts: ExpertProducts = "loop"
    microbatches: int = 1
    zero: int = 3  # as in Layout
    ring: bool = False  # as in Layout
    repeats: int = 1  # as in Layout
    seed: int = 0  # of what is drawn in a step

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
            self.config, backend=self.backend, precision=self.precision, experts=self.experts, remat=self.remat,
            shard=self.shard, train=self.config.dropout > 0,
        )  # fmt: skip

    def _cast(self, params: Any) -> Any:
        """Parameters are cast once and where they are, so that what travels is of compute width. Routers choose in
        float32."""

        def cast(path: Any, p: Array) -> Array:
            wide = self.precision == "f32" or path[-1].key.endswith("_router")
            return p.astype(jnp.float32 if wide else jnp.bfloat16)

        made = jax.tree_util.tree_map_with_path(cast, params)
        return OnMesh(self.mesh).stored(made, self.table)

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
            params = gathered(params, self._staged_table, self.mesh)
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
        if shared_out(self.config)[0]:
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
        stack, _ = stack_of(self.config)
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
        grads = jax.tree.map(self._over_groups, found.grads, self._staged_table)
        return jax.tree.map(lambda a: a.sum(0), found._replace(grads={}))._replace(grads=grads)

    def _over_groups(self, grad: Array, param: Param) -> Array:
        """Of every group [groups, ...] the sum [...], as it is stored. What fsdp stores apart is scattered over it, the
        innermost of REPLICAS, before the others add theirs, or these would send all of it."""
        shape, dims, stored = self.mesh.shape, ("batch", *param.dims), param_spec(param, self.mesh.shape)
        if any("fsdp" in axes_of(entry) for entry in stored):
            grad = grad.reshape(-1, shape["fsdp"], *grad.shape[1:]).sum(1)
            grad = at(grad, self.mesh, (dims, PartitionSpec(REPLICAS[:-1], *stored)))
        return at(grad.sum(0), self.mesh, (param.dims, stored))

    def _split(self, array: Array) -> Array:
        """Every microbatch takes its part of every device's sequences, so that none has to move."""
        parts = array.reshape(-1, self.microbatches, *array.shape[1:]).swapaxes(0, 1)
        return self.shard.activation(parts, "channel", *("batch", "length")[: array.ndim])
