"""What one device sends in one step, in closed form: every collective by mesh axis, kind and bytes.

It follows from the two rule tables of `sharding.py` and from the table of parameters, not from a family of models:

    weights       stored in more parts than they are used in: gathered for use, their gradients scattered back, and
                  reduced where devices hold other tokens (ZeRO: Rajbhandari et al. 2020, sec. 5 and 7)
    tensor        the stream is gathered where a layer's maps read it, and what they make is scattered; backward the
                  other way round (Korthikanti et al. 2022, sec. 4.2.2)
    context       keys and values gathered, or around a ring (Llama 3, 2024, sec. 3.3.2; Liu et al. 2023)
    expert        what experts take and what they give, each an all-to-all (Lepikhin et al. 2020, sec. 3.3)
    pipeline      the stream from stage to stage in every tick (Narayanan et al. 2021, sec. 2.2)

A compiled step that sends more replicates what it should not, or asks for it twice. Scalars and sums of a token's
scores or logits are left out: of D numbers of a token they are one. So is, over tensor, the gradient of a head of keys
that all queries share.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jax.sharding import PartitionSpec

from transformer.config import Block, LayerKind, ModelConfig, Precision, Remat
from transformer.experts import capacity_of
from transformer.losses import CHUNK_TOKENS
from transformer.models import model_params
from transformer.params import Param, leaves
from transformer.remat import EXPERT_PRODUCT, base_of, fates
from transformer.sharding import (
    ACTIVATION_RULES,
    AXES,
    PARAMETER_RULES,
    REPLICAS,
    Layout,
    along_stream,
    axes_of,
    param_spec,
    spec,
)  # fmt: skip

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"]


class Collective(NamedTuple):
    """One device's part in a collective that every step has `times`."""

    axis: str  # of the mesh, or several joined, outermost first: "fsdp", "data_fsdp"
    kind: Kind
    n_bytes: float
    """The whole: what a gather makes, what a scatter or reduction takes, what one device sends in an all-to-all or a
    permutation."""
    times: float
    where: str
    """forward, backward: of layers; embedding, head, their gradients too; gradients, parameters: once a step."""


class _Passes(NamedTuple):
    """Layers of a block on one device: all that it has, those that it works through at once, and how often, each way;
    and whether the stages of a pipeline share the block out."""

    n_layers: int
    at_once: int
    times: int
    shared_out: bool = False


@dataclass(frozen=True, kw_only=True)
class Step:
    """A train step as it is laid out."""

    config: ModelConfig
    layout: Layout
    remat: Remat
    precision: Precision
    microbatches: int
    micro_batch_seqs: int
    seq_len: int

    def collectives(self) -> list[Collective]:
        """All of them, those that have nobody to talk to left out."""
        found = [*self._weights(), *self._layers(), *self._ends(), *self._stages()]
        return [c for c in found if c.axis and c.times and c.n_bytes]

    # What is counted with

    @property
    def _width(self) -> int:
        """Bytes of a number that travels."""
        return 2 if self.precision == "bf16" else 4

    @property
    def _ticks(self) -> int:
        """Times that a device works on its part of a microbatch, each way: in a pipeline idle ticks send too."""
        layout = self.layout
        return layout.repeats * self.microbatches + layout.pipeline - 1 if layout.pipeline > 1 else self.microbatches

    @property
    def _entering(self) -> int:
        """Times that a gradient is sent to the embedding: once a microbatch, and in each of the last v S - 1 ticks of a
        pipeline, for the compiler cannot know which of these are idle."""
        layout = self.layout
        return self.microbatches + (layout.pipeline * layout.repeats - 1 if layout.pipeline > 1 else 0)

    @property
    def _tokens(self) -> float:
        """Of one device's part of a microbatch, positions between layers not yet apart."""
        return self.micro_batch_seqs * self.seq_len / self.layout.context

    @property
    def _stream(self) -> float:
        """Bytes of those tokens' vectors."""
        return self._tokens * self.config.d_model * self._width

    def _over(self, axes: Sequence[str]) -> tuple[str, ...]:
        """Of some axes those that split anything, outermost first."""
        return tuple(axis for axis in AXES if axis in axes and getattr(self.layout, axis) > 1)

    def _one(self, axes: Sequence[str], kind: Kind, n_bytes: float, times: float, where: str) -> Iterator[Collective]:
        yield Collective("_".join(self._over(axes)), kind, n_bytes, times, where)

    # Parameters

    def _weights(self) -> Iterator[Collective]:
        for path, param in leaves(model_params(self.config)):
            yield from self._weight(path, param)

    def _weight(self, path: str, param: Param) -> Iterator[Collective]:
        layout, zero = self.layout, self.layout.zero
        passes = self._passes(path)
        layers = passes is not None
        where = "forward" if layers else "embedding" if path.startswith("embedding") else "head"
        passes = passes or _Passes(1, 1, self.microbatches if where == "head" else self._ticks)
        stored = self._over([axis for entry in self._stored(param, passes) for axis in axes_of(entry)])
        used = self._over([axis for dim in param.dims[layers:] for axis in axes_of(ACTIVATION_RULES.get(dim))])
        one = math.prod(param.shape[layers:]) / layout.split(used)  # numbers of a layer, as a device computes with them
        if layers and passes.shared_out:
            used = ("pipeline", *used)
        whole, each = one * passes.n_layers, one * passes.at_once
        width = 4 if path.endswith("_router") else self._width
        gathered = [axis for axis in stored if axis not in used]
        if layers and passes.shared_out:
            yield from self._to_stages(param, whole / layout.split(tuple(gathered)), passes)
        again = layers and (base_of(self.remat) != "none" or layout.pipeline > 1)
        once = [] if zero == 3 else [axis for axis in gathered if axis != "pipeline"]
        yield from self._one(once, "all-gather", whole * width, 1, "parameters")
        often = [axis for axis in gathered if axis not in once]
        yield from self._one(often, "all-gather", each * width, passes.times, where)
        yield from self._one(often, "all-gather", each * width, passes.times * again, "backward")
        table = path == "embedding/tokens"
        tied = self.config.tied and table
        if tied and layout.pipeline > 1:
            yield from self._one(often, "all-gather", each * width, self.microbatches, "head")
        shared = () if not layers or passes.shared_out else ("pipeline",)  # its stages have other microbatches
        met = self._over([*shared, *self._tokens_of(param), *(("tensor",) if len(param.dims) - layers == 1 else ())])
        summed = [axis for axis in met if axis not in used]
        where = "backward" if layers else where
        if where == "embedding":
            passes = passes._replace(times=self._entering)
        if table and layout.pipeline == 1 and (zero < 2 or not set(summed) & set(stored)):
            passes = passes._replace(times=1)  # XLA adds what microbatches only reduce behind their loop
        if zero < 2:
            apart = [axis for axis in summed if axis in REPLICAS]
            inside = [axis for axis in summed if axis not in REPLICAS]
            yield from self._one(inside, "all-reduce", each * width, passes.times, where)
            # They added up in float32, and meet over fsdp before replicas meet. XLA scatters no sum that goes to more
            # axes than it is over.
            over_fsdp, rest = ([a for a in apart if (a in gathered) == there] for there in (True, False))
            kind: Kind = "reduce-scatter" if set(gathered) <= set(apart) else "all-reduce"
            yield from self._one(over_fsdp, kind, whole * 4, 1, "gradients")
            yield from self._one(rest, "all-reduce", whole * 4 / layout.split(tuple(gathered)), 1, "gradients")
        else:
            yield from self._reduced(summed, stored, each * width, passes.times, where)
            if tied:
                yield from self._reduced(summed, stored, each * width, self.microbatches, "head")
            if table and self.config.family == "encoder_decoder":  # read twice
                scattered = [axis for axis in summed if axis in stored]
                yield from self._one(scattered, "reduce-scatter", each * width, passes.times, where)

    def _passes(self, path: str) -> "_Passes | None":
        """Of the layers that a parameter is of; None of one that is of no layer."""
        found = re.search(r"block_(\d+)/", path)
        if found is None:
            return None
        block = next(block for block in self.config.blocks() if block.first == int(found[1]))
        return self._of_block(block)

    def _of_block(self, block: Block) -> "_Passes":
        """Of a pipeline all stages share out the last block; layers before it are worked off by every stage, on its
        share of the microbatches."""
        layout = self.layout
        if layout.pipeline == 1:
            return _Passes(block.repeats, block.repeats, self.microbatches)
        if block != self.config.blocks()[-1]:
            return _Passes(block.repeats, block.repeats, -(-self.microbatches // layout.pipeline))
        at_once = -(-block.repeats // (layout.pipeline * layout.repeats))
        return _Passes(at_once * layout.repeats, at_once, self._ticks, shared_out=True)

    def _stored(self, param: Param, passes: "_Passes") -> PartitionSpec:
        """As a step finds it: of layers that stages share out, with its stage."""
        if passes.shared_out:
            return spec(param.dims, PARAMETER_RULES)
        return param_spec(param, self.layout.shape)

    def _to_stages(self, param: Param, n: float, passes: "_Passes") -> Iterator[Collective]:
        """Layers whose order is not that of the stages go to them and their gradients back, once a step, by way of
        slices of the stream (`stages.to_stages`). Where that does not divide, every stage gathers all gradients, and
        all layers too if each stage has several parts of them."""
        size = param.shape[0]
        if not self._moved(size):
            return
        ways = ((self._width, "parameters"), (4, "gradients"))
        if any("pipeline" in axes_of(entry) for entry in along_stream(param, self.layout.shape)):
            way = 2 if size % self.layout.pipeline == 0 else 1  # stored by layers, or along the stream already
            for width, where in ways:
                yield from self._one(("pipeline",), "all-to-all", n * width, way, where)
            return
        of_all = n / passes.n_layers * size
        for width, where in ways[self.layout.repeats == 1 :]:
            yield from self._one(("pipeline",), "all-gather", of_all * width, 1, where)

    def _moved(self, layers: int) -> bool:
        """Whether stages have layers in another order, or room for more."""
        return self.layout.repeats > 1 or layers % self.layout.pipeline > 0

    def _tokens_of(self, param: Param) -> tuple[str, ...]:
        """Axes whose devices have other tokens to use a parameter on."""
        batch = "expert_batch" if "experts" in param.dims else "batch"
        return (*axes_of(ACTIVATION_RULES[batch]), *axes_of(ACTIVATION_RULES["length"]))

    def _reduced(
        self, axes: Sequence[str], stored: Sequence[str], n_bytes: float, times: float, where: str
    ) -> Iterator[Collective]:
        """A sum over axes, scattered over those that store it apart."""
        scattered = [axis for axis in axes if axis in stored]
        yield from self._one(scattered, "reduce-scatter", n_bytes, times, where)
        rest = [axis for axis in axes if axis not in stored]
        yield from self._one(rest, "all-reduce", n_bytes / self.layout.split(tuple(scattered)), times, where)

    # Layers

    def _layers(self) -> Iterator[Collective]:
        config = self.config
        stacks = {"encoder": (False,), "decoder": (False,), "encoder_decoder": (False, True)}[config.family]
        for cross in stacks:
            for block in config.blocks():
                passes = self._of_block(block)
                for kind in block.kinds:
                    yield from self._layer(kind, cross, passes.times * passes.at_once)

    def _layer(self, kind: LayerKind, cross: bool, times: float) -> Iterator[Collective]:
        config = self.config
        parts = 1 if config.parallel else 2 + cross  # that read the stream, and whose results are added to it
        read = parts + cross + (config.parallel and config.parallel_norms)  # the memory too; each norm's by itself
        redone = base_of(self.remat) != "none"
        together = redone or self.layout.pipeline > 1  # no stage keeps what was gathered
        again = 0
        if base_of(self.remat) == "full":  # what no gradient needs is not made again: the last part's result
            again = parts - (config.norm_placement == "pre")
        tensor, stream = ("tensor",), self._stream
        yield from self._one(tensor, "all-gather", stream, (read - cross) * times, "forward")
        # The memory is the same for all layers, so XLA gathers it before their loop.
        yield from self._one(tensor, "all-gather", stream, cross * self.microbatches, "forward")
        yield from self._one(tensor, "reduce-scatter", stream, parts * times, "forward")
        yield from self._one(tensor, "all-gather", stream, (read * together + parts) * times, "backward")
        yield from self._one(tensor, "reduce-scatter", stream, (again + read) * times, "backward")
        yield from self._keys((1 + cross) * times, redone)
        if config.position == "relative":  # of every query and key, before it is added up by distance
            pairs = config.n_heads / self.layout.tensor * self._tokens / self.micro_batch_seqs * self.seq_len
            yield from self._one(axes_of(ACTIVATION_RULES["batch"]), "all-reduce", 4 * pairs, times, "backward")
        if kind.experts:
            yield from self._experts(times, redone)
            if not config.capacity_factor:  # what their hidden units make is added up in float32
                more = stream * (4 / self._width - 1)
                yield from self._one(tensor, "reduce-scatter", more, times, "forward")

    def _keys(self, times: float, redone: bool) -> Iterator[Collective]:
        config, C = self.config, self.layout.context
        heads = max(config.n_kv_heads / self.layout.tensor, 1)  # one that all queries share is on every device
        n_bytes = self._tokens * C * heads * (config.d_head + config.value_size) * self._width
        if not self.layout.ring:
            yield from self._one(("context",), "all-gather", n_bytes, times, "forward")
            yield from self._one(("context",), "all-gather", n_bytes, times * redone, "backward")
            yield from self._one(("context",), "reduce-scatter", n_bytes, times, "backward")
            return
        turn = n_bytes / C
        yield from self._one(("context",), "collective-permute", turn, C * times, "forward")
        yield from self._one(("context",), "collective-permute", turn, C * times * redone, "backward")
        # Their gradients go with them, in float32.
        both = turn * (1 + 4 / self._width)
        yield from self._one(("context",), "collective-permute", both, C * times, "backward")

    def _experts(self, times: float, redone: bool) -> Iterator[Collective]:
        config, E = self.config, self.layout.expert
        assert config.n_experts
        if config.capacity_factor:
            rows = self.micro_batch_seqs * config.n_experts * capacity_of(self.seq_len, config)
        else:  # to each device as many rows as there might be
            rows = E * self._tokens * min(config.experts_per_token, config.n_experts / E)
        n_bytes = rows * config.d_model * self._width
        again = 2 * redone  # there and back
        if redone and config.capacity_factor and fates(self.remat)[EXPERT_PRODUCT] != "recompute":
            again = 1  # what came back is kept
        yield from self._one(("expert",), "all-to-all", n_bytes, 2 * times, "forward")
        yield from self._one(("expert",), "all-to-all", n_bytes, (2 + again) * times, "backward")

    # Before and after the layers

    def _ends(self) -> Iterator[Collective]:
        """The vocabulary is split over pipeline and tensor: what is looked up is added up over both, and so is the
        gradient of what the head reads. XLA scatters that over tensor first where a device has one sequence: over the
        shards that have a chunk's positions, and sums what is left over the others and the stages."""
        stacks = 2 if self.config.family == "encoder_decoder" else 1
        vocab = axes_of(ACTIVATION_RULES["vocab"])
        tensor, M = ("tensor",), self.microbatches
        summed: Kind = "all-reduce" if self.layout.pipeline > 1 else "reduce-scatter"
        yield from self._one(vocab, summed, self._stream, stacks * self._ticks, "embedding")
        if self.config.embed_norm and self.layout.pipeline > 1:  # looked up again for the norm's gradient
            yield from self._one(vocab, summed, self._stream, self._entering, "embedding")
        yield from self._one(tensor, "all-gather", self._stream, stacks * self._entering, "embedding")
        if self.config.position == "learned":  # whose gradient XLA gathers by itself
            yield from self._one(tensor, "all-gather", self._stream, stacks * M, "embedding")
        yield from self._one(tensor, "all-gather", self._stream, M, "head")
        if self.layout.pipeline > 1 and self.micro_batch_seqs > 1:
            yield from self._one(vocab, "all-reduce", self._stream, M, "head")
            return
        yield from self._one(tensor, "reduce-scatter", self._stream, M, "head")
        chunks = -(-int(self._tokens) // CHUNK_TOKENS)
        apart = chunks > 1 and self.layout.tensor % chunks == 0  # a chunk's positions are not on all shards
        rest, n = (vocab, chunks) if apart and self.layout.pipeline > 1 else (("pipeline",), 1)
        yield from self._one(rest, "all-reduce", n * self._stream / self.layout.tensor, M, "head")

    # From stage to stage

    def _stages(self) -> Iterator[Collective]:
        """To the next stage and to the last; and what one stage has and all work on, added up in float32."""
        apart = self._stream / self.layout.tensor
        for times, where, end in ((self.microbatches, "forward", "head"), (self._entering, "backward", "embedding")):
            yield from self._one(("pipeline",), "collective-permute", apart, self._ticks, where)
            yield from self._one(("pipeline",), "all-reduce", apart * 4 / self._width, times, end)


def by_axis(collectives: Sequence[Collective]) -> Mapping[str, float]:
    """Bytes of a step by "axis kind", as a forecast's `collective_bytes` has them."""
    sums: defaultdict[str, float] = defaultdict(float)
    for c in collectives:
        sums[f"{c.axis} {c.kind}"] += c.n_bytes * c.times
    return dict(sums)
