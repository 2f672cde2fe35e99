"""Seconds of a training step in closed form: the simulator's physics without a schedule.

A microbatch passes forward and backward through the layers of a stage; what an axis sends is hidden beside compute as
far as the framework lets it, and exposed beyond. Stages wait for each other (Narayanan et al. 2021: (p - 1) / v of a
microbatch's time), gradients are summed, the optimizer passes over its shard.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from functools import lru_cache

from experiments.forecast.closed_form import memory, scanned
from experiments.forecast.closed_form.places import EXPERT_SHARDS, REPLICAS, SHARDS, Places
from experiments.forecast.closed_form.setup import Setup
from experiments.forecast.closed_form.work import Layer, Work, head, layer
from experiments.forecast.rates import Rates
from experiments.hardware import Device

INTERFERENCE = {"gpu": 0.15, "tpu": 0.0, "cpu": 0.0}
"""Part of hidden communication that compute loses: NCCL's kernels hold 16 to 24 of 108 to 148 multiprocessors while
they run; a TPU's links have engines of their own."""

ADAM_PASSES_BYTES = 12
"""Beside state, weights and gradient once each: the check of the norm and the unscaled or clipped gradient, in
float32, three passes of 4 bytes a parameter."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """`breakdown_s` adds up to `step_s`; `hidden_s`: communication beside compute, by axis."""

    step_s: float
    breakdown_s: dict[str, float]
    hidden_s: dict[str, float]
    memory_bytes: dict[str, float]

    @property
    def total_bytes(self) -> float:
        return sum(self.memory_bytes.values())


@dataclass(slots=True)
class _Pass:
    """Seconds of one microbatch through one layer (or head), one way."""

    matmul: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    host: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    expert: float = 0.0

    @property
    def compute(self) -> float:
        return self.matmul + self.attention + self.elementwise + self.host

    @property
    def all(self) -> float:
        return self.compute + self.tensor + self.context + self.expert

    def times(self, n: float) -> "_Pass":
        return _Pass(*(n * getattr(self, name) for name in self.__slots__))

    def plus(self, other: "_Pass") -> "_Pass":
        return _Pass(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


class ClosedForm:
    """The forecaster of one device. It remembers what a shape costs: one instance serves a search."""

    def __init__(self, device: Device) -> None:
        self.device = device.per_jax_device()
        self.rates = Rates(self.device)
        self.places = Places(self.device)
        self._product_s = lru_cache(maxsize=1 << 16)(self.rates.product_in_step_s)
        self._stages: dict[tuple[object, ...], tuple[Setup, _Pass, _Pass, tuple[_Pass, _Pass]]] = {}

    def forecast(self, setup: Setup) -> Forecast:
        """Step time and memory of a setup. RequestError where the device lacks a fact that it needs."""
        forward, backward, ends = self._stage(setup)
        return _Clock(self, setup, forward, backward, ends).forecast()

    def _stage(self, setup: Setup) -> tuple[_Pass, _Pass, tuple[_Pass, _Pass]]:
        """Forward and backward of the fullest stage's layers, and of the head, for one microbatch."""
        layout = setup.layout
        key = (
            id(setup.model), id(setup.practice), layout.tensor, layout.context, layout.expert, layout.pipeline,
            setup.seq_len, setup.micro_batch_seqs, setup.precision, setup.remat, setup.remat_share,
            setup.sequence_parallel, setup.slow_scaling, setup.adapters_only,
        )  # fmt: skip
        if key not in self._stages:
            inner = dataclasses.replace(layout, slice=1, pipeline=1, data=1, fsdp=1)
            (forward, backward), ends = self._layer_passes(dataclasses.replace(setup, layout=inner))
            n = math.ceil(memory.stacks(setup.model) / layout.pipeline) / memory.stacks(setup.model)
            self._stages[key] = (setup, forward.times(n), backward.times(n), ends)  # the setup keeps its ids alive
        return self._stages[key][1:]

    def _layer_passes(self, setup: Setup) -> tuple[tuple[_Pass, _Pass], tuple[_Pass, _Pass]]:
        """All layers of the model, and the head; one microbatch."""
        forward, backward = _Pass(), _Pass()
        for (kind, causal, cross), n in memory.kinds(setup.model).items():
            there, back = self._one_layer(setup, layer(setup, kind, causal=causal, cross=cross))
            forward, backward = forward.plus(there.times(n)), backward.plus(back.times(n))
        there, back = (self._compute(setup, work, backward=False) for work in head(setup))
        return (forward, backward), (there, back)

    def _one_layer(self, setup: Setup, of: Layer) -> tuple[_Pass, _Pass]:
        forward = self._compute(setup, of.forward, backward=False)
        backward = self._compute(setup, of.backward, backward=True)
        self._exchange(setup, of, forward, is_backward=False)
        self._exchange(setup, of, backward, is_backward=True)
        # Kept with attention's result, but of unfused attention, whose scores are made again.
        kept = self._compute(setup, of.scores, backward=False) if setup.practice.attention_in_chunks else _Pass()
        if setup.remat == "selective":
            again = self._compute(setup, of.scores, backward=False)
            backward = backward.plus(again.times(setup.remat_share))
        elif setup.remat == "ops":
            again = _Pass(
                matmul=forward.matmul / 2, elementwise=forward.elementwise - kept.elementwise,
                host=forward.host - kept.host, tensor=forward.tensor / 2,
            )  # fmt: skip
            backward = backward.plus(again.times(setup.remat_share))
        elif setup.remat == "dots":
            again = _Pass(
                elementwise=forward.elementwise - kept.elementwise, host=forward.host - kept.host,
                tensor=forward.tensor / 2,
            )  # fmt: skip
            backward = backward.plus(again.times(setup.remat_share))
        elif setup.remat == "full":
            again = forward
            if not setup.practice.repeats_last:
                ends = sum(self._product_s(product) for product in of.ends)
                again = dataclasses.replace(forward, matmul=forward.matmul - ends)
            backward = backward.plus(again.times(setup.remat_share))
        return forward, backward

    def _compute(self, setup: Setup, work: Work, *, backward: bool) -> _Pass:
        """Seconds on the device, or on the host if it cannot launch the kernels as fast."""
        matmul = sum(self._product_s(product) for product in work.products)
        attention = 0.0
        if work.attention_flops:
            speed = setup.practice.kernel_speed(is_hopper="fp8" in self.device.peak_flops_per_s)
            attention = self.rates.attention_s(
                work.attention_flops, setup.wide_dtype, head=setup.model.d_head, backward=backward,
                length=max(setup.seq_len // setup.layout.context, 1), causal=setup.model.family == "decoder",
            ) / speed  # fmt: skip
        elementwise = self.rates.memory_s(work.bytes)
        device = matmul + attention + elementwise + work.kernels * self.rates.launch_s
        host = work.kernels * setup.practice.host_s_per_kernel
        return _Pass(matmul, attention, elementwise, max(host, device) - matmul - attention - elementwise)

    def _exchange(self, setup: Setup, of: Layer, into: _Pass, *, is_backward: bool) -> None:
        """What tensor, context and expert axes send in one pass of a layer, exposed."""
        layout, practice = setup.layout, setup.practice
        sizes, one = layout.sizes, self.places.collective_s
        if layout.tensor > 1:
            joints = 1 if setup.model.parallel else 2
            if setup.sequence_parallel:
                gather = one(sizes, "all-gather", of.stream_bytes, ("tensor",))
                scatter = one(sizes, "reduce-scatter", of.stream_bytes, ("tensor",))
                sent = joints * (gather + scatter)
                again = joints * gather if is_backward else 0.0  # the maps' inputs, for the weights' gradients
                hidden = again + (joints * scatter if is_backward and practice.tensor_backward_overlap else 0.0)
                sent += again
                if practice.batched_copies and setup.micro_batch_seqs > 1:
                    n_moved = joints * (3 if is_backward else 2)
                    into.elementwise += n_moved * self.rates.memory_s(2 * of.stream_bytes)
            else:
                sent = joints * one(sizes, "all-reduce", of.stream_bytes, ("tensor",))
                hidden = sent if is_backward and practice.tensor_backward_overlap else 0.0
            hidden = min(hidden, into.matmul / 2)
            hidden += practice.tensor_overlap * (sent - hidden)
            into.tensor += sent - hidden
            into.elementwise += INTERFERENCE[self.device.platform] * hidden
        if layout.context > 1:
            whole = of.kv_bytes * layout.context * (2 if is_backward else 1)
            sent = one(sizes, "all-gather", whole, ("context",))
            hidden = min(sent, into.attention * (layout.context - 1) / layout.context)
            into.context += sent - hidden
            into.elementwise += INTERFERENCE[self.device.platform] * hidden
        if layout.expert > 1 and of.expert_bytes:
            sent = 2 * one(sizes, "all-to-all", of.expert_bytes, ("expert",))
            hidden = min(sent, into.compute) if practice.expert_overlap else 0.0
            into.expert += sent - hidden
            into.elementwise += INTERFERENCE[self.device.platform] * hidden


@dataclass(slots=True)
class _Clock:
    """From one microbatch to the step."""

    model: ClosedForm
    setup: Setup
    forward: _Pass
    backward: _Pass
    ends: tuple[_Pass, _Pass]
    held: tuple[float, float] = field(init=False)
    sizes: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.held, self.sizes = memory.held(self.setup), self.setup.layout.sizes
        if self.setup.practice.schedule == "lockstep":  # all stages work on the head, each with its part of it
            there, back = self.ends
            p = self.setup.layout.pipeline
            self.ends = there.times(1 / p), back.times(1 / p)

    def forecast(self) -> Forecast:
        setup, m = self.setup, self.setup.microbatches
        hidden: dict[str, float] = {}
        layers_s, p = self.forward.all + self.backward.all, setup.layout.pipeline
        passes = [self.forward, self.backward, *(() if setup.layers_only else self.ends)]  # the last stage has the head
        parts: dict[str, float] = {name: m * sum(getattr(one, name) for one in passes) for name in _Pass.__slots__}
        parts["fsdp"] = self._gathers(hidden)
        parts["bubble"] = (p - 1) / setup.layout.repeats * (layers_s + parts["fsdp"] / m) if p > 1 else 0.0
        if not setup.layers_only:
            parts["pipeline"] = self._messages(hidden)
        if not (setup.layers_only or setup.adapters_only):
            of_layers, of_ends = self._accumulate()
            parts["elementwise"] += of_layers + of_ends
            parts["data"] = self._reduce(hidden)
            if setup.practice.schedule == "lockstep":  # idle ticks add up too, and above ZeRO 1 sum over replicas
                again = of_layers + (parts["data"] if setup.layout.zero > 1 else 0.0)
                parts["bubble"] += (p - 1) / setup.layout.repeats * again / m
            parts["optimizer"] = self._optimize()
            parts["host"] += setup.practice.step_host_s
        lost = INTERFERENCE[self.model.device.platform] * sum(hidden.values())
        parts["elementwise"] += lost
        parts["stragglers"] = sum(parts.values()) * (self.model.places.slowest(setup.layout.n_devices) - 1)
        kept = {name: s for name, s in parts.items() if s}
        return Forecast(sum(kept.values()), kept, hidden, memory.memory_bytes(setup, self.held))

    def _send(self, kind: str, n_bytes: float, *axes: str) -> float:
        return self.model.places.collective_s(self.sizes, kind, n_bytes, axes)

    def _gathers(self, hidden: dict[str, float]) -> float:
        """Exposed fetching of weights under ZeRO 3, all microbatches: layer by layer beside the layer before."""
        setup, practice = self.setup, self.setup.practice
        if setup.layout.zero < 3 or memory.shards_of(setup.layout) == 1:
            return 0.0
        times = setup.microbatches if practice.gather_every_microbatch else 1
        dense, experts = self.held
        gather = self._send("all-gather", 2 * dense, *SHARDS) + self._send("all-gather", 2 * experts, *EXPERT_SHARDS)
        scatter = self._send("reduce-scatter", practice.reduce_bytes * dense, *SHARDS)
        scatter += self._send("reduce-scatter", practice.reduce_bytes * experts, *EXPERT_SHARDS)
        again = gather if practice.reshard_after_forward else 0.0
        there = self.forward.all + self.ends[0].all
        back = self.backward.all + self.ends[1].all
        n = math.ceil(memory.stacks(setup.model) / setup.layout.pipeline)
        if setup.layout.pipeline > 1 and not practice.stages_overlap:
            exposed_there, exposed_back = gather, again + scatter
        elif practice.fetch == "in_layer":
            beside = scanned.Beside(
                self.forward.matmul, self.forward.attention, self.backward.attention, self.backward.all
            )
            again, exposed_there, exposed_back = scanned.in_layer(
                setup, self.model.rates, beside, gather, scatter, sum(self.held)
            )
        elif practice.gather_overlap:
            exposed_there = max(gather - there * (n - 1) / n, gather / n)
            exposed_back = max(again + scatter - back * (n - 1) / n, scatter / n)
        else:
            exposed_there, exposed_back = gather, again + scatter
        sent = gather + again + scatter
        hidden["fsdp"] = times * (sent - exposed_there - exposed_back)
        return times * (exposed_there + exposed_back)

    def _messages(self, hidden: dict[str, float]) -> float:
        """Exposed messages between stages."""
        setup, layout = self.setup, self.setup.layout
        if layout.pipeline == 1:
            return 0.0
        n_bytes = setup.micro_batch_seqs * setup.seq_len / layout.context * setup.model.d_model * setup.element_bytes
        split = layout.tensor if setup.practice.scatter_gather or setup.sequence_parallel else 1
        one = self.model.places.neighbour_s(self.sizes, n_bytes / split)
        if split > 1 and not setup.sequence_parallel:
            one += self._send("all-gather", n_bytes, "tensor")
        sent = 2 * one * layout.repeats * setup.microbatches
        exposed = 2 * one * (layout.pipeline - 1) if setup.practice.pipeline_overlap else sent
        exposed = min(exposed, sent)
        if setup.practice.schedule == "lockstep":
            # Into and out of the stages: what is looked up; what the last stage has, and both gradients, in float32.
            summed = n_bytes + n_bytes / layout.tensor * (1 + 2 * 4 / setup.element_bytes)
            return sent + setup.microbatches * self._send("all-reduce", summed, "pipeline")
        hidden["pipeline"] = sent - exposed
        return exposed

    def _accumulate(self) -> tuple[float, float]:
        """Passes over weights and gradients of all microbatches: of the layers, and of embedding and head beside them.
        The old sum of gradients is read and, outside the product, the new part too."""
        setup, practice = self.setup, self.setup.practice
        m, memory_s = setup.microbatches, self.model.rates.memory_s
        if practice.fusion == "scanned":
            return m * memory_s(scanned.looped_bytes(setup, sum(self.held))), m * memory_s(scanned.ends_bytes(setup))
        if m == 1 and practice.fused_accumulation:
            return 0.0, 0.0
        return m * memory_s(practice.sum_bytes * sum(self.held)), 0.0

    def _reduce(self, hidden: dict[str, float]) -> float:
        """Exposed sum of the gradients over replicas, and the gather of new weights where their optimizer is split."""
        setup, layout, practice = self.setup, self.setup.layout, self.setup.practice
        dense, experts = self.held
        n_bytes, shards = practice.reduce_bytes, memory.shards_of(layout)
        shard = dense / shards + experts * layout.expert / shards
        gather = 0.0
        if shards == 1:
            reduce = self._send("all-reduce", n_bytes * dense, "data")
        elif layout.zero == 3:
            reduce = self._send("all-reduce", n_bytes * shard, "data")
        else:
            reduce = self._send("reduce-scatter", n_bytes * dense, *REPLICAS)
            reduce += self._send("reduce-scatter", n_bytes * experts, "data", *EXPERT_SHARDS)
            gather = self._send("all-gather", 2 * dense, *SHARDS) + self._send(
                "all-gather", 2 * experts, *EXPERT_SHARDS
            )
        between = self._send("all-reduce", n_bytes * shard, "slice")
        if layout.pipeline > 1 and setup.model.tied and practice.schedule != "lockstep":  # the table's two copies
            table = memory.parameters(setup.model)[3] / layout.tensor * practice.reduce_bytes
            between += 2 * self.model.places.neighbour_s(self.sizes, table)
        times = setup.microbatches if practice.reduce_every_microbatch and layout.zero > 1 else 1
        sent = times * (reduce + between) + gather
        if not practice.data_overlap or (layout.pipeline > 1 and not practice.stages_overlap):
            return sent + self._parts(dense + experts)
        if practice.late_sums:
            hides = not between and shards == 1
            tables = memory.tables(setup) / (dense + experts)
            n = math.ceil(memory.stacks(setup.model) / layout.pipeline)
            layers = reduce * (1 - tables)
            beside = self.backward.all * (n - 1) / n
            shown = reduce * tables + max(layers - beside, layers / n) if hides else reduce + between
            exposed = times * shown + gather
            hidden["data"] = sent - exposed
            return exposed
        exposed = 0.0
        if practice.layers_in_loop:  # gradients of a loop's layers leave it together
            exposed, reduce, between = reduce + between if shards == 1 else between, 0.0 if shards == 1 else reduce, 0.0
        n = math.ceil(memory.stacks(setup.model) / layout.pipeline)
        beside = (self.backward.all + self.ends[1].all) * (n - 1) / n
        exposed += times * max(reduce + between - beside, (reduce + between) / n)
        exposed += max(gather - self.forward.all * (n - 1) / n, gather / n) if practice.weights_overlap else gather
        hidden["data"] = sent - exposed
        return exposed

    def _parts(self, n_weights: float) -> float:
        """Sums over parts of a sequence, and over experts' devices, where gradients otherwise add up apart."""
        if not self.setup.practice.reduce_every_microbatch:
            return 0.0
        each = sum(self._send("all-reduce", 2 * n_weights, axis) for axis in ("expert", "context"))
        return self.setup.microbatches * each

    def _optimize(self) -> float:
        """Adam passes over its state, the master weights, gradients and new weights of this device's shard."""
        practice = self.setup.practice
        dense, experts = self.held
        shards = memory.shards_of(self.setup.layout)
        dense, experts = dense / shards, experts * self.setup.layout.expert / shards
        gradient = practice.gradient_bytes
        if self.setup.microbatches == 1 and practice.fresh_gradient_bytes:
            gradient = practice.fresh_gradient_bytes
        more = 4 + gradient if practice.joined_update else ADAM_PASSES_BYTES
        per_weight = 2 * practice.optimizer_bytes + gradient + 2 + more
        return self.model.rates.memory_s(per_weight * (dense + experts))
