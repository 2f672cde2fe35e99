"""What a run takes beside its devices: electricity, and the care of machines that fail. Sections of hardware.toml."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Fact(NamedTuple):
    """A value and where it is from. `date` is the source's, or its version; None if it has neither."""

    value: Any
    source: str
    date: str | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """`pue`: facility watts over device watts. `host_share`: watts of the host over those of the
    board, added where only the board's are known."""

    pue: float
    usd_per_kwh: float
    host_share: float
    sources: Mapping[str, Fact] = field(default_factory=dict, hash=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reliability:
    """What befalls a run that takes weeks, of any cluster until a file says what is known of yours.

    A failure is whatever stops the job. Nodes that are slow hold all others up, for every step waits for them.
    """

    failures_per_device_day: Mapping[str, float] = field(hash=False)  # by platform, of a device as its vendor sells it
    restart_s: float  # from a failure to the next step: seen, understood, nodes replaced, checkpoint loaded
    node_loss_share: float  # of the failures, after which a node is out of use
    repair_s: float  # mean, until such a node is back

    node_write_bytes_per_s: float  # what one node writes to storage
    storage_bytes_per_s: float  # what storage takes of all nodes together
    checkpoint_stall_s: float  # that training waits for a checkpoint which is written behind it

    slow_nodes_per_node_day: float  # how often a node becomes slow
    slow_step_share: float  # how much longer a step takes then, of a usual one
    slow_s: float  # mean, until it is found and replaced

    sources: Mapping[str, Fact] = field(default_factory=dict, hash=False, repr=False)
