"""Every option in closed form: which fit, which is fastest, and why another loses."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from experiments.config import RunConfig
from experiments.forecast.closed_form import memory
from experiments.forecast.closed_form.practice import Practice, ours
from experiments.forecast.closed_form.setup import Setup
from experiments.forecast.closed_form.step import ClosedForm, Forecast
from experiments.forecast.topology import chip_of
from experiments.hardware import Device
from transformer.layouts import Split
from transformer.sharding import AXES, Layout

REMATS = ("full", "dots", "none")
"""From the one that keeps the least."""

LOST: dict[str, str] = {
    "bubble": "bubble", "tensor": "exposed tensor", "fsdp": "exposed fsdp", "data": "exposed data",
    "context": "exposed context", "expert": "exposed expert", "pipeline": "exposed pipeline",
}  # fmt: skip
"""What a part of a step is called where it is why an option loses, with its share of the step."""

SLOWER = {"products": "small products", "elementwise": "memory passes", "optimizer": "optimizer", "host": "launches"}
"""The same of compute, with the share that the winner does without."""


@dataclass(frozen=True, slots=True)
class Option:
    """A layout, how it is fed, what it keeps, and what that takes."""

    n_devices: int
    layout: Layout
    micro_batch_seqs: int
    microbatches: int
    remat: str
    total_bytes: float
    limit_bytes: float | None
    forecast: Forecast | None = field(default=None, compare=False)  # of those that fit

    @property
    def global_batch_seqs(self) -> int:
        return self.micro_batch_seqs * self.microbatches * self.layout.data_shards

    @property
    def fits(self) -> bool:
        return self.limit_bytes is None or self.total_bytes <= self.limit_bytes

    @property
    def step_s(self) -> float:
        return math.inf if self.forecast is None else self.forecast.step_s

    @property
    def family(self) -> tuple[str, ...]:
        """The axes that it uses."""
        return tuple(axis for axis in AXES if getattr(self.layout, axis) > 1)

    @property
    def bones(self) -> tuple[int, ...]:
        """What a device computes: options alike in this differ in little."""
        one = self.layout
        return one.pipeline, one.expert, one.context, one.tensor


@dataclass(slots=True)
class Found:
    """Of one device count. `fitting`: fastest first; `smallest`: of each family the one that needs the least memory."""

    fitting: list[Option] = field(default_factory=list)
    smallest: dict[tuple[str, ...], Option] = field(default_factory=dict)
    n_tried: int = 0


class Search:
    """Options of one model on one device, with the costs of shapes remembered."""

    def __init__(self, run: RunConfig, device: Device, fill: float = 1.0) -> None:
        """`fill`: share of the memory that an option may take."""
        self.run, self.device, self.fill = run, device.per_jax_device(), fill
        self.model = ClosedForm(device)
        self._config = run.resolved_model
        self._practice = cache(self._practice_of)

    def best(self, splits: Iterable[Split], batch_seqs: int) -> Found:
        """Every split of a batch, under every remat. What needs more memory than an option that does not fit is not
        asked: keeping more, or with a larger micro-batch, a layout never needs less, but for a step of one
        microbatch, whose gradients add up to nothing."""
        found = Found()
        for layout, same in itertools.groupby(splits, key=lambda split: split.layout):
            per_shard = batch_seqs // layout.data_shards
            too_large = dict.fromkeys(REMATS, False)
            for m in sorted((split.microbatches for split in same), reverse=True):
                for i, remat in enumerate(REMATS):
                    found.n_tried += 1
                    if too_large[remat] and m > 1:
                        continue
                    option = self.option(layout, per_shard // m, m, remat)
                    if option.fits:
                        found.fitting.append(option)
                        continue
                    too_large |= dict.fromkeys(REMATS[i:], True)
                    if option.total_bytes < getattr(found.smallest.get(option.family), "total_bytes", math.inf):
                        found.smallest[option.family] = option
        found.fitting.sort(key=lambda option: (option.step_s, option.total_bytes))
        return found

    def option(self, layout: Layout, micro_batch_seqs: int, microbatches: int, remat: str) -> Option:
        """One option; its time only if it fits."""
        setup = Setup(
            model=self._config, layout=layout, seq_len=self.run.length, micro_batch_seqs=micro_batch_seqs,
            microbatches=microbatches, precision=self.run.resolved_precision(self.device.platform),
            remat=remat, practice=self._practice(layout.zero, layout.context > 1),  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        total, usable = sum(memory.memory_bytes(setup, memory.held(setup)).values()), self.device.usable_bytes
        limit = None if usable is None else self.fill * usable
        fits = limit is None or total <= limit
        return Option(
            layout.n_devices, layout, micro_batch_seqs, microbatches, remat, total, limit,
            self.model.forecast(setup) if fits else None,
        )  # fmt: skip

    def _practice_of(self, zero: int, splits_sequence: bool) -> Practice:
        layout = Layout(zero=zero, context=2 if splits_sequence else 1)
        return ours(self.run.resolved_attention(chip_of(self.device), layout)[0], layout)


def reason(loser: Option, winner: Option) -> str:
    """In few words, why the one loses against the other."""
    if not loser.fits:
        return f"does not fit: {loser.total_bytes / 1e9:,.0f} GB"
    assert loser.forecast is not None
    assert winner.forecast is not None
    if loser.step_s <= 1.01 * winner.step_s:
        return "as fast" if loser is not winner else "the fastest"
    parts, best = loser.forecast.breakdown_s, winner.forecast.breakdown_s
    more = {name: parts.get(name, 0.0) - best.get(name, 0.0) for name in {*parts, *best} - {"stragglers"}}
    more["products"] = more.pop("matmul") + more.pop("attention")
    words, again = LOST | SLOWER, REMATS.index(loser.remat) < REMATS.index(winner.remat)
    if again:
        more["products"] += more.pop("elementwise")
        words |= {"products": "recomputation"}
    worst = max(more, key=lambda name: more[name])
    return f"{words[worst]} {100 * (parts[worst] if worst in LOST else more[worst]) / loser.step_s:.0f} %"


def lean(fitting: Iterable[Option]) -> list[Option]:
    """Of options, fastest first, those that need a twentieth less memory than every faster one."""
    kept: list[Option] = []
    for option in fitting:
        if not kept or option.total_bytes <= 0.95 * kept[-1].total_bytes:
            kept.append(option)
    return kept


def front(options: Iterable[Any], *costs: Callable[[Any], float]) -> list[Any]:
    """Those that none is better than in one cost and as good in all others, by the first cost (Pareto)."""
    kept: list[tuple[Any, tuple[float, ...]]] = []
    for option in sorted(options, key=lambda option: tuple(cost(option) for cost in costs)):
        point = tuple(cost(option) for cost in costs)
        if not any(all(a <= b for a, b in zip(other, point, strict=True)) for _, other in kept):
            kept.append((option, point))
    return [option for option, _ in kept]


def of_layouts(found: Found) -> list[Option]:
    """Of each layout the fastest option, fastest first."""
    return list({option.layout: option for option in reversed(found.fitting)}.values())[::-1]


def families(found: Found) -> Iterator[Option]:
    """The best of each set of axes: the fastest that fits, else the smallest."""
    seen = set()
    for option in (*found.fitting, *sorted(found.smallest.values(), key=lambda option: option.total_bytes)):
        if option.family not in seen:
            seen.add(option.family)
            yield option
