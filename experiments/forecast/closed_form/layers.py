"""Seconds of one microbatch through one layer, forward and backward: what it computes, and what tensor, context and
expert axes send that nothing hides."""

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

from experiments.forecast.closed_form import memory
from experiments.forecast.closed_form.mixture import Mixture, mixture
from experiments.forecast.closed_form.places import Places
from experiments.forecast.closed_form.setup import Setup
from experiments.forecast.closed_form.work import Layer, Loop, Work, head, layer
from experiments.forecast.rates import Rates
from experiments.hardware import Device

INTERFERENCE = {"gpu": 0.15, "tpu": 0.0, "cpu": 0.0}
"""Part of hidden communication that compute loses: NCCL's kernels hold 16 to 24 of 108 to 148 multiprocessors while
they run; a TPU's links have engines of their own."""


@dataclass(slots=True)
class Pass:
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

    def times(self, n: float) -> "Pass":
        return Pass(*(n * getattr(self, name) for name in self.__slots__))

    def plus(self, other: "Pass") -> "Pass":
        return Pass(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


class Layers:
    """Of one device, with the costs of shapes remembered."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.rates = Rates(device)
        self.places = Places(device)
        self._product_s = lru_cache(maxsize=1 << 16)(self.rates.product_in_step_s)
        self._known: dict[tuple[object, ...], tuple[Setup, list[tuple[Pass, Pass]], tuple[Pass, Pass]]] = {}

    def of_stage(self, setup: Setup) -> tuple[Pass, Pass, tuple[Pass, Pass]]:
        """Forward and backward of the fullest stage's layers, and of the head, for one microbatch."""
        layers, ends = self._each(setup)
        forward, backward = Pass(), Pass()
        for (there, back), n in zip(layers, memory.layers_of_stage(setup).values(), strict=True):
            forward, backward = forward.plus(there.times(n)), backward.plus(back.times(n))
        return forward, backward, ends

    def _each(self, setup: Setup) -> tuple[list[tuple[Pass, Pass]], tuple[Pass, Pass]]:
        """Of one layer of each kind, and of the head; one microbatch."""
        layout = setup.layout
        key = (
            id(setup.model), id(setup.practice), layout.tensor, layout.context, layout.expert,
            setup.seq_len, setup.micro_batch_seqs, setup.precision, setup.remat, setup.remat_share,
            setup.sequence_parallel, setup.slow_scaling, setup.adapters_only,
        )  # fmt: skip
        if key not in self._known:
            inner = dataclasses.replace(setup, layout=dataclasses.replace(layout, slice=1, pipeline=1, data=1, fsdp=1))
            layers = [
                self._one_layer(inner, layer(inner, kind, causal=causal, cross=cross), kind.experts)
                for kind, causal, cross in memory.kinds(setup.model)
            ]
            there, back = (self._compute(inner, work, backward=False) for work in head(inner))
            self._known[key] = (setup, layers, (there, back))  # the setup keeps its ids alive
        return self._known[key][1:]

    def _one_layer(self, setup: Setup, of: Layer, has_experts: bool) -> tuple[Pass, Pass]:
        routed = mixture(setup) if has_experts and setup.practice.fusion == "scanned" else None
        works = of.forward, of.again, of.backward
        if routed:
            pairs = zip(works, (routed.forward, routed.again, routed.backward), strict=True)
            works = [work.plus(of_experts) for work, of_experts in pairs]
        if setup.remat == "dots":
            works = works[0], dataclasses.replace(works[1], loops=()), works[2]
        forward, again, backward = (self._compute(setup, work, backward=work is works[2]) for work in works)
        for one, is_backward in ((forward, False), (again, False), (backward, True)):
            self._exchange(setup, of, routed, one, is_backward=is_backward)
            if routed:
                self._exchange_rows(setup, of, routed, one, is_backward=is_backward, is_first=one is forward)
        share = setup.remat_share
        if setup.remat == "selective":
            return forward, backward.plus(self._compute(setup, of.scores, backward=False).times(share))
        if setup.remat == "none":
            return forward, backward
        if setup.remat != "full":  # of every other product, or of none
            # What joins chunks is kept with attention's result; unfused attention's scores are made again.
            kept = self._compute(setup, of.scores, backward=False) if setup.practice.attention_in_chunks else Pass()
            again = Pass(
                matmul=again.matmul / 2 if setup.remat == "ops" else 0.0,
                elementwise=again.elementwise - kept.elementwise, host=again.host - kept.host,
                tensor=again.tensor / 2, expert=again.expert if routed else 0.0,
            )  # fmt: skip
        return forward, backward.plus(again.times(share))

    def _compute(self, setup: Setup, work: Work, *, backward: bool) -> Pass:
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
        for loop in work.loops:
            multiplied, moved = self._loop_s(loop)
            matmul, elementwise = matmul + multiplied, elementwise + moved
        device = matmul + attention + elementwise + work.kernels * self.rates.launch_s
        host = work.kernels * setup.practice.host_s_per_kernel
        return Pass(matmul, attention, elementwise, max(host, device) - matmul - attention - elementwise)

    def _loop_s(self, loop: Loop) -> tuple[float, float]:
        """Of its products, and of its other kernels; each lasts a launch at least."""
        launch = self.rates.launch_s
        multiplied = sum(max(self._product_s(product), launch) for product in loop.products)
        moved = sum(max(self.rates.memory_s(n_bytes), launch) for n_bytes in loop.passes)
        return loop.times * multiplied, loop.times * moved

    def _exchange_rows(
        self, setup: Setup, of: Layer, routed: Mixture, into: Pass, *, is_backward: bool, is_first: bool
    ) -> None:
        """What the rows of routed experts send in one pass, exposed. They go and come back.

        Forward the experts that every token passes hide it, made again too with what they have backward. Rows'
        gradients come beside the products made again, and leave beside the gradients of the weights.
        """
        sizes, one = setup.layout.sizes, self.places.collective_s
        add = one(sizes, "all-reduce", routed.summed_bytes, ("tensor",))
        others = routed.up[1:] if is_backward else ()  # beside whose products the gradient before is added up
        into.tensor += add + sum(max(add - self._product_s(product), 0.0) for product in others)
        way = one(sizes, "all-to-all", routed.rows_bytes, ("expert",))
        if not way:
            return
        seconds = self._product_s
        shared = sum(seconds(product) for product in of.shared)
        if is_backward:
            arriving = sum(seconds(product) for product in routed.up) if setup.remat == "full" else 0.0
            hidden = min(way, arriving) + min(2 * way, sum(seconds(product) for product in routed.of_weights))
        else:
            hidden = min(2 * way, shared) if is_first else min(way, 3 * shared)
        if not routed.up:
            hidden = 0.0
        kept = not is_first and not is_backward and routed.up and setup.remat == "dots"  # what came back, not the rows
        into.expert += (1 if kept else 2) * way - hidden
        into.elementwise += INTERFERENCE[self.device.platform] * hidden

    def _exchange(self, setup: Setup, of: Layer, routed: Mixture | None, into: Pass, *, is_backward: bool) -> None:
        """What tensor, context and expert axes send in one pass of a layer, exposed; of our own program without the
        rows of routed experts."""
        layout, practice = setup.layout, setup.practice
        sizes, one = layout.sizes, self.places.collective_s
        if layout.tensor > 1:
            joints = 1 if setup.model.parallel else 2
            if setup.sequence_parallel:
                gather = one(sizes, "all-gather", of.stream_bytes, ("tensor",))
                scatter = one(sizes, "reduce-scatter", of.stream_bytes, ("tensor",))
                # Of routed experts every device has the whole sum already.
                scatters = joints - (routed is not None and bool(routed.summed_bytes) and not of.shared)
                sent = joints * gather + scatters * scatter
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
        if layout.expert > 1 and of.expert_bytes and not routed:
            sent = 2 * one(sizes, "all-to-all", of.expert_bytes, ("expert",))
            hidden = min(sent, into.compute) if practice.expert_overlap else 0.0
            into.expert += sent - hidden
            into.elementwise += INTERFERENCE[self.device.platform] * hidden
