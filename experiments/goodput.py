"""How much of a run's time moves it on, with failures: in closed form, and simulated. Pure.

A job works for an interval, saves a checkpoint, and goes on. Whatever fails stops all of it: a node is replaced, the
job starts again from the last checkpoint that is safe. In closed form, with failures at rate f (no memory: time
between them is exponential), interval t, stall s that training waits for a checkpoint, w until it is safe (w = s
where training waits for all of it), and restart r, during which it may fail again:

    f t exp(-f (r + w - s)) / (exp(f (t + s)) - 1)

of the time is work that is kept: of all periods between failures, 1 / f long, the checkpoints that became safe. Where
w = s this is eq. 20 of Daly (2006), A higher order estimate of the optimum checkpoint interval for restart dumps,
upside down. Two things go on beside it and multiply it:

- Nodes go to repair and come back, each by itself; the job waits where all spares are there too. That is Erlang's
  loss formula with one place more than spares, whatever the distribution of the repairs.
- While at least one node is slow every step is: nodes become slow at some rate, and each is found after a while.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run meets, in seconds and per second of the whole job."""

    n_nodes: int
    failures_per_s: float
    restart_s: float
    stall_s: float  # that training waits for a checkpoint
    write_s: float  # until a checkpoint is safe: at least the stall
    interval_s: float  # of work between two checkpoints
    node_loss_share: float
    repair_s: float
    spare_nodes: int
    slow_per_s: float  # nodes that become slow, of all
    slow_s: float
    slow_step_share: float

    @property
    def cycle_s(self) -> float:
        return self.interval_s + self.stall_s

    @property
    def lag_s(self) -> float:
        """Of training, while its last checkpoint is still being written."""
        return self.write_s - self.stall_s


class Shares(NamedTuple):
    """Fractions of the wall time; they add up to 1, and the first is the goodput."""

    goodput: float
    checkpoints: float
    lost_work: float
    restarts: float
    waiting_for_nodes: float
    slow_nodes: float


def closed_form(run: Run) -> Shares:
    """The expectation of a long run."""
    rate = run.failures_per_s
    to_safety_s = run.restart_s + run.lag_s + run.cycle_s
    kept = rate * run.interval_s * math.exp(-rate * to_safety_s) / -math.expm1(-rate * run.cycle_s)
    waiting = waiting_share(run, run.spare_nodes)
    there = 1 - waiting
    stalls = kept * run.stall_s / run.interval_s
    restarts = -math.expm1(-rate * run.restart_s)
    slow = kept * -math.expm1(-run.slow_per_s * run.slow_s) * run.slow_step_share / (1 + run.slow_step_share)
    parts = [kept - slow, stalls, 1 - restarts - kept - stalls, restarts]
    return Shares(*(there * part for part in parts), waiting_for_nodes=waiting, slow_nodes=there * slow)


def waiting_share(run: Run, spare_nodes: int) -> float:
    """Of the time, that the job waits for a node."""
    return next(itertools.islice(_waiting_shares(run), spare_nodes, None))


def _waiting_shares(run: Run) -> Iterator[float]:
    """With no spare, one, two, ...: Erlang's loss formula for one node more than there are spares."""
    offered = run.failures_per_s * run.node_loss_share * run.repair_s
    blocked = 1.0
    for places in itertools.count(1):
        blocked = offered * blocked / (places + offered * blocked)
        yield blocked


def best_interval_s(run: Run) -> float:
    """Work between two checkpoints that loses least: Daly (2006), eq. 37. A checkpoint starts after the last is safe.

    The first term is Young's (1974), the others correct it where a stall is not short beside the time between
    failures; from twice that time on, nothing but that time itself is sensible.
    """
    between_s = 1 / run.failures_per_s
    part = run.stall_s / (2 * between_s)
    if part >= 1:
        return max(between_s, run.lag_s)
    young_s = math.sqrt(2 * run.stall_s * between_s)
    return max(young_s * (1 + math.sqrt(part) / 3 + part / 9) - run.stall_s, run.lag_s)


def simulated_interval_s(run: Run, *, seed: int, failures: int = 20_000) -> float:
    """The best of 61 intervals, a quarter to four times the run's own, against one random series of failures."""
    up_s = np.random.default_rng(seed).exponential(1 / run.failures_per_s, failures) - run.restart_s - run.lag_s
    intervals = np.unique(np.maximum(run.interval_s * np.geomspace(1 / 4, 4, 61), run.lag_s))
    kept = [t * np.floor(np.maximum(up_s, 0) / (t + run.stall_s)).sum() for t in intervals]
    return float(intervals[int(np.argmax(kept))])


def cheapest_spares(run: Run) -> int:
    """The number of spare nodes with which the run takes the fewest node-hours: a spare costs as much as a node."""
    node_hours = ((run.n_nodes + spares) / (1 - share) for spares, share in enumerate(_waiting_shares(run)))
    return next(spares for spares, (this, more) in enumerate(itertools.pairwise(node_hours)) if this <= more)


def simulate(run: Run, work_s: float, *, repeats: int, seed: int) -> np.ndarray:
    """Wall seconds of `repeats` runs of `work_s` seconds of undisturbed training, failure by failure.

    All nodes and spares are there at the start. Shares nothing with the closed form but its input.
    """
    rng = np.random.default_rng(seed)
    slow = run.slow_step_share / (1 + run.slow_step_share)
    needed_s = work_s / (1 - slow * _slow_shares(run, work_s, repeats, rng))
    wall_s, done_s = np.zeros(repeats), np.zeros(repeats)
    back_s = np.zeros((repeats, run.spare_nodes + 1))  # when each spare is there, and last the node that just failed
    going = np.arange(repeats)
    restart_s = 0.0
    while going.size:
        up_s = rng.exponential(1 / run.failures_per_s, going.size)
        left_s = restart_s + (needed_s[going] - done_s[going]) * run.cycle_s / run.interval_s
        ends = up_s >= left_s
        wall_s[going] += np.minimum(up_s, left_s)
        safe = np.floor((up_s - restart_s - run.lag_s) / run.cycle_s).clip(min=0)
        done_s[going] += safe * run.interval_s
        going, restart_s = going[~ends], run.restart_s

        lost = going[rng.random(going.size) < run.node_loss_share]
        back_s[lost, -1] = wall_s[lost] + rng.exponential(run.repair_s, lost.size)
        first = back_s[lost].argmin(axis=1)
        wall_s[lost] = np.maximum(wall_s[lost], back_s[lost, first])
        back_s[lost, first] = back_s[lost, -1]  # the first that is there works; the others are the spares
    return wall_s


def _slow_shares(run: Run, work_s: float, repeats: int, rng: np.random.Generator) -> np.ndarray:
    """Of each run's working time, the share with at least one slow node."""
    shares = np.zeros(repeats)
    before_s = 10 * run.slow_s  # so that the start is like any other time
    for n, count in enumerate(rng.poisson(run.slow_per_s * (work_s + before_s), repeats)):
        start_s = np.sort(rng.uniform(-before_s, work_s, count))
        until_s = np.maximum.accumulate(start_s + rng.exponential(run.slow_s, count)).clip(0, work_s)
        since_s = np.maximum(start_s, np.concatenate([[0.0], until_s])[:count])
        shares[n] = (until_s - since_s).clip(min=0).sum() / work_s
    return shares
