"""Which layouts a model can have: what an axis asks of it, every valid one, and few that try all with all.

`sharding.py` says what the axes do; here is what they cannot.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

from transformer.config import ModelConfig
from transformer.errors import RequestError
from transformer.models import model_params
from transformer.params import ParamTree, leaves
from transformer.sharding import ACTIVATION_RULES, AXES, Layout, axes_of, param_spec
from transformer.stages import shared_out


class Split(NamedTuple):
    """A layout and the microbatches that pass through it in one step."""

    layout: Layout
    microbatches: int = 1

    def __str__(self) -> str:
        return f"{self.layout}" + (f" x {self.microbatches}" if self.microbatches > 1 else "")


def check(config: ModelConfig, split: Split, *, length: int) -> None:
    """RequestError for the first thing that a model, its sequences or its microbatches cannot do in a layout."""
    layout = split.layout
    check_divides(model_params(config), layout)
    _check_length(config, layout, length)
    _check_stages(config, split)
    if layout.expert > 1 and config.n_experts is None:
        raise RequestError(f"expert={layout.expert}: the model has no experts; nearest: fsdp={layout.expert}")
    if layout.ring and layout.context == 1:
        raise RequestError("ring=1 is of the context axis, and context=1; nearest: ring=0")


@cache
def divisors(n: int) -> tuple[int, ...]:
    """
    >>> divisors(12)
    (1, 2, 3, 4, 6, 12)
    """
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return tuple(sorted({*low, *(n // d for d in low)}))


def check_divides(tree: ParamTree, layout: Layout) -> None:
    """RequestError for the first parameter dim that its axes do not divide: tensor, dim, both numbers, nearest."""
    for path, param in leaves(tree):
        entries = zip(param.dims, param.shape, param_spec(param, layout.shape), strict=True)
        for dim, size, entry in entries:
            for rule in (entry, ACTIVATION_RULES.get(dim)):
                axes = [axis for axis in axes_of(rule) if getattr(layout, axis) > 1]
                parts = layout.split(tuple(axes))
                if not axes or size % parts == 0 or dim == "layers":
                    continue
                near = min(divisors(size), key=lambda n: abs(n - parts))
                given = ",".join(f"{axis}={getattr(layout, axis)}" for axis in axes)
                nearest_ = f"{axes[0]}={near}" if len(axes) == 1 else f"a product of {near}"
                if dim == "vocab":
                    nearest_ += f", or --model.vocab_multiple={parts} for unused rows"
                raise RequestError(f"{path}: dim {dim!r} is {size}, which {given} does not divide; nearest: {nearest_}")


def _check_length(config: ModelConfig, layout: Layout, length: int) -> None:
    if layout.context > 1 and config.capacity_factor:
        raise RequestError(
            f"context={layout.context}: which tokens experts of a capacity drop depends on the whole sequence; "
            "nearest: --model.capacity_factor=none"
        )
    # Each part of the context has two chunks, and each part of what lies between layers as much.
    multiple = math.lcm(2 * layout.context if layout.context > 1 else 1, layout.context * layout.tensor)
    if length % multiple:
        near = max(1, round(length / multiple)) * multiple
        raise RequestError(
            f"--seq_len={length} does not split over context={layout.context},tensor={layout.tensor}: "
            f"expected a multiple of {multiple}; nearest: --seq_len={near}"
        )


def _check_stages(config: ModelConfig, split: Split) -> None:
    layout, M = split
    S, v = layout.pipeline, layout.repeats
    if S == 1:
        if v > 1:
            raise RequestError(f"repeats={v} is of the pipeline axis, and pipeline=1; nearest: repeats=1")
        return
    if config.family == "encoder_decoder":
        raise RequestError(
            f"pipeline={S}: an encoder_decoder has two stacks, of which one reads the other's end; nearest: fsdp={S}"
        )
    if config.dropout:
        raise RequestError(f"pipeline={S} has no dropout, which is {config.dropout}; nearest: --model.dropout=0")
    before, main = shared_out(config)
    longer = any(block.repeats * len(block.kinds) > main.repeats * len(main.kinds) for block in before)
    if longer or any(kind.experts for block in before for kind in block.kinds):
        kinds = ", ".join(f"{block.repeats} x {len(block.kinds)}" for block in (*before, main))
        raise RequestError(
            f"pipeline={S} needs layers that repeat up to the last, and before them none with experts; these are "
            f"{kinds}; nearest: pipeline=1"
        )
    if main.repeats < S * v:
        of = f" of {len(main.kinds)} layers" if len(main.kinds) > 1 else " layers"
        raise RequestError(
            f"pipeline={S},repeats={v}: {main.repeats}{of} are fewer than {S * v} parts; nearest: {main.repeats} parts"
        )
    if v > 1 and M % S:
        near = max(1, round(M / S)) * S
        raise RequestError(
            f"pipeline={S},repeats={v}: {M} microbatches do not pass in groups of {S}; nearest: --microbatches={near}"
        )


def valid(config: ModelConfig, n_devices: int, *, length: int, batch: int) -> Iterator[Split]:
    """Every layout of so many devices: axis sizes, ZeRO stages, repeats, rings and microbatches of a batch."""
    for sizes in itertools.product(divisors(n_devices), repeat=len(AXES)):
        if math.prod(sizes) != n_devices:
            continue
        axes = Layout(**dict(zip(AXES, sizes, strict=True)))
        zeros = (1, 2, 3) if axes.split(("fsdp", "expert", "context")) > 1 else (3,)
        repeats = (1, 2) if axes.pipeline > 1 else (1,)
        parts = [m for m in (1, 2, 4, 8, 16) if m >= axes.pipeline and batch % (axes.data_shards * m) == 0]
        for zero, v, ring, m in itertools.product(zeros, repeats, (0, 1) if axes.context > 1 else (0,), parts[:2]):
            split = Split(dataclasses.replace(axes, zero=zero, repeats=v, ring=ring), m)
            try:
                check(config, split, length=length)
            except RequestError:
                continue
            yield split


def covering(splits: Sequence[Split], n: int) -> list[Split]:
    """`n` of them, in an order in which each tries as many pairs of features as no other would: two axes above one, an
    axis and a stage of ZeRO, and so on."""
    left, seen, chosen = list(splits), set[frozenset[str]](), list[Split]()
    pairs = {split: _pairs(split) for split in left}
    while left and len(chosen) < n:
        best = max(left, key=lambda split: len(pairs[split] - seen))
        left.remove(best)
        chosen.append(best)
        seen |= pairs[best]
    return chosen


def _pairs(split: Split) -> set[frozenset[str]]:
    layout = split.layout
    features = [axis for axis in AXES if getattr(layout, axis) > 1]
    features += [f"zero={layout.zero}", f"ring={layout.ring}"] + ["repeats"] * (layout.repeats > 1)
    features += ["microbatches"] * (split.microbatches > 1)
    return {frozenset(pair) for pair in itertools.combinations_with_replacement(features, 2)}
