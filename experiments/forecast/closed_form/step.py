"""Seconds of a training step in closed form: the simulator's physics without a schedule.

A microbatch passes forward and backward through the layers of a stage; what an axis sends is hidden beside compute as
far as the framework lets it, and exposed beyond. Stages wait for each other (Narayanan et al. 2021: (p - 1) / v of a
microbatch's time), gradients are summed, the optimizer passes over its shard.
"""

import math
from dataclasses import dataclass, field

from experiments.forecast.closed_form import memory, scanned
from experiments.forecast.closed_form.layers import INTERFERENCE, Layers, Pass
from experiments.forecast.closed_form.places import EXPERT_SHARDS, REPLICAS, SHARDS
from experiments.forecast.closed_form.setup import Setup
from experiments.hardware import Device

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


class ClosedForm:
    """The forecaster of one device. It remembers what a shape costs: one instance serves a search."""

    def __init__(self, device: Device) -> None:
        self.device = device.per_jax_device()
        self.layers = Layers(self.device)
        self.rates, self.places = self.layers.rates, self.layers.places

    def forecast(self, setup: Setup) -> Forecast:
        """Step time and memory of a setup. RequestError where the device lacks a fact that it needs."""
        return _Clock(self.layers, setup, *self.layers.of_stage(setup)).forecast()


@dataclass(slots=True)
class _Clock:
    """From one microbatch to the step."""

    of: Layers
    setup: Setup
    forward: Pass
    backward: Pass
    ends: tuple[Pass, Pass]
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
        parts: dict[str, float] = {name: m * sum(getattr(one, name) for one in passes) for name in Pass.__slots__}
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
        lost = INTERFERENCE[self.of.device.platform] * sum(hidden.values())
        parts["elementwise"] += lost
        parts["stragglers"] = sum(parts.values()) * (self.of.places.slowest(setup.layout.n_devices) - 1)
        kept = {name: s for name, s in parts.items() if s}
        return Forecast(sum(kept.values()), kept, hidden, memory.memory_bytes(setup, self.held))

    def _send(self, kind: str, n_bytes: float, *axes: str) -> float:
        return self.of.places.collective_s(self.sizes, kind, n_bytes, axes)

    def _gathered(self) -> scanned.Sent:
        """All weights of the stage fetched once."""
        dense, experts = self.held
        return self._sent("all-gather", 2 * dense, 2 * experts)

    def _sent(self, kind: str, dense_bytes: float, expert_bytes: float) -> scanned.Sent:
        return scanned.Sent(
            self._send(kind, dense_bytes, *SHARDS), self._send(kind, expert_bytes, *EXPERT_SHARDS),
            self._send(kind, 1.0, *SHARDS),
        )  # fmt: skip

    def _gathers(self, hidden: dict[str, float]) -> float:
        """Exposed fetching of weights under ZeRO 3, all microbatches: layer by layer beside the layer before."""
        setup, practice = self.setup, self.setup.practice
        if setup.layout.zero < 3 or memory.shards_of(setup.layout) == 1:
            return 0.0
        times = setup.microbatches if practice.gather_every_microbatch else 1
        dense, experts = self.held
        n_bytes = practice.reduce_bytes
        gathers = self._gathered()
        scatters = self._sent("reduce-scatter", n_bytes * dense, n_bytes * experts)
        gather, scatter = gathers.all, scatters.all
        again = gather if practice.reshard_after_forward else 0.0
        sent = gather + again + scatter
        there = self.forward.all + self.ends[0].all
        back = self.backward.all + self.ends[1].all
        n = math.ceil(memory.stacks(setup.model) / setup.layout.pipeline)
        if setup.layout.pipeline > 1 and not practice.stages_overlap:
            exposed_there, exposed_back = gather, again + scatter
        elif practice.fetch == "in_layer":
            beside = scanned.Beside(
                self.forward.matmul, self.forward.attention, self.backward.attention, self.backward.all
            )
            sent, exposed_there, exposed_back = scanned.in_layer(setup, self.of.rates, beside, gathers, scatters, dense)
        elif practice.gather_overlap:
            exposed_there = max(gather - there * (n - 1) / n, gather / n)
            exposed_back = max(again + scatter - back * (n - 1) / n, scatter / n)
        else:
            exposed_there, exposed_back = gather, again + scatter
        hidden["fsdp"] = times * (sent - exposed_there - exposed_back)
        return times * (exposed_there + exposed_back)

    def _messages(self, hidden: dict[str, float]) -> float:
        """Exposed messages between stages."""
        setup, layout = self.setup, self.setup.layout
        if layout.pipeline == 1:
            return 0.0
        n_bytes = setup.micro_batch_seqs * setup.seq_len / layout.context * setup.model.d_model * setup.element_bytes
        split = layout.tensor if setup.practice.scatter_gather or setup.sequence_parallel else 1
        one = self.of.places.neighbour_s(self.sizes, n_bytes / split)
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
        m, memory_s = setup.microbatches, self.of.rates.memory_s
        if practice.fusion == "scanned":
            return m * memory_s(scanned.looped_bytes(setup, *self.held)), m * memory_s(scanned.ends_bytes(setup))
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
        elif practice.reduce_every_microbatch and layout.zero == 1 and layout.expert * layout.context > 1:
            # Summed inside already. XLA scatters no sum over more axes than those that it goes over.
            reduce = self._send("all-reduce", n_bytes * dense, "fsdp")
            reduce += self._send("reduce-scatter", n_bytes * experts, "fsdp")
            reduce += self._send("all-reduce", n_bytes * (dense + experts) / layout.fsdp, "data")
            gather = self._gathered().all
        else:
            reduce = self._send("reduce-scatter", n_bytes * dense, *REPLICAS)
            reduce += self._send("reduce-scatter", n_bytes * experts, "data", *EXPERT_SHARDS)
            gather = self._gathered().all
        between = self._send("all-reduce", n_bytes * shard, "slice")
        if layout.pipeline > 1 and setup.model.tied and practice.schedule != "lockstep":  # the table's two copies
            table = memory.parameters(setup.model)[3] / layout.tensor * practice.reduce_bytes
            between += 2 * self.of.places.neighbour_s(self.sizes, table)
        times = setup.microbatches if practice.reduce_every_microbatch and layout.zero > 1 else 1
        sent = times * (reduce + between) + gather
        if not practice.data_overlap or (layout.pipeline > 1 and not practice.stages_overlap):
            return sent + self._parts(dense, experts)
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

    def _parts(self, dense: float, experts: float) -> float:
        """Sums over parts of a sequence, and of dense weights over experts' devices, where under ZeRO 1 gradients
        otherwise add up apart; those over experts' devices beside the experts' products."""
        if not self.setup.practice.reduce_every_microbatch or self.setup.layout.zero > 1:
            return 0.0
        each = self._send("all-reduce", 2 * (dense + experts), "context")
        each += max(self._send("all-reduce", 2 * dense, "expert") - self.backward.matmul, 0.0)
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
        return self.of.rates.memory_s(per_weight * (dense + experts))
