"""Every layout that a model can have on so many devices, and every way to feed it one batch."""

import itertools
from collections.abc import Iterator
from functools import cache

from transformer.config import ModelConfig
from transformer.errors import RequestError
from transformer.layouts import Split, check, divisors
from transformer.sharding import Layout

REPEATS = (1, 2, 4)
"""Parts of a stage: more of them than four have one or two layers, and send more than they save."""


def splits(
    config: ModelConfig, n_devices: int, *, length: int, batch_seqs: int, most_tensor: int, slices: int = 1
) -> Iterator[Split]:
    """Layouts that `check` does not refuse, with every number of microbatches of a batch of `batch_seqs`. `data` takes
    what is left. Keys around a ring are not among them: they send what gathering sends."""

    @cache
    def can(microbatches: int = 1, **sizes: int) -> bool:
        try:
            check(config, Split(Layout(**sizes), microbatches), length=length)
        except RequestError:
            return False
        return True

    within = n_devices // slices
    sides = {axis: [n for n in divisors(within) if can(**{axis: n})] for axis in ("pipeline", "expert", "context")}
    tensor = [n for n in divisors(within) if n <= most_tensor and can(tensor=n)]
    for p, e, c, t in itertools.product(sides["pipeline"], sides["expert"], sides["context"], tensor):
        if within % (p * e * c * t) or not can(context=c, tensor=t):
            continue
        for fsdp in divisors(within // (p * e * c * t)):
            data = within // (p * e * c * t * fsdp)
            # Dims that fsdp splits context splits too, and no dim knows them apart.
            if batch_seqs % (slices * data * fsdp * e) or not can(pipeline=p, expert=e, fsdp=fsdp * c, tensor=t):
                continue
            axes = Layout(slice=slices, pipeline=p, data=data, fsdp=fsdp, expert=e, context=c, tensor=t)
            for layout in _used(axes):
                for m in divisors(batch_seqs // axes.data_shards):
                    if layout.repeats == 1 or can(m, pipeline=p, repeats=layout.repeats):
                        yield Split(layout, m)


def fed(config: ModelConfig, layout: Layout, *, length: int, batch_seqs: int) -> list[Split]:
    """One layout with every number of microbatches. RequestError if the model or the batch has no such layout."""
    shards = layout.data_shards
    if batch_seqs % shards:
        near = max(1, round(batch_seqs / shards)) * shards
        raise RequestError(
            f"layout {layout}: {batch_seqs} sequences do not divide over {shards} data shards; nearest: {near}"
        )
    found = []
    for m in divisors(batch_seqs // shards):
        split = Split(layout, m)
        if layout.repeats == 1 or m % layout.pipeline == 0:
            check(config, split, length=length)
            found.append(split)
    if not found:
        check(config, Split(layout, batch_seqs // shards), length=length)
    return found


def _used(axes: Layout) -> Iterator[Layout]:
    """What ZeRO splits, and parts of a stage."""
    zeros = (1, 2, 3) if axes.split(("fsdp", "expert", "context")) > 1 else (3,)
    for zero, repeats in itertools.product(zeros, REPEATS if axes.pipeline > 1 else (1,)):
        sizes = zip(axes.shape, axes.sizes, strict=True)
        yield Layout(**dict(sizes), zero=zero, repeats=repeats)
