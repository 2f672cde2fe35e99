"""What XLA says while it compiles. It writes to file descriptor 2 from C++, past Python's streams."""

import dataclasses
import math
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from experiments.diagnosis.source import Origin, Sources
from experiments.forecast.instructions import BITS

_REMATERIALIZED = "Involuntary full rematerialization"
_BETTER_SAID = (
    "hlo_rematerialization.cc", "llo_module.h", "tpu_spmd_partitioner.cc", "shardy_xla_pass.cc", "lowering_emitter.cc",
)  # fmt: skip
"""Warnings that tell a user nothing: of memory, which a record states better, and of the compiler's own parts."""
_NEWS = re.compile(r"^[IW]\d{4} [\d:.]+\s+\d+ (\S+?):\d+\]")

_SAID = re.compile(
    r"cannot go from sharding (\{.*?\}) to (\{.*?\}) efficiently for HLO operation \S+ = (\w+)\[([\d,]*)\].*?"
    r"metadata=(\{.*?\})(?:\.|, )"
)


@contextmanager
def heard() -> Iterator[list[str]]:
    """The warnings of involuntary rematerialization that are written meanwhile; known when the block is left. What
    else is written goes where it would have gone."""
    warnings: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield warnings
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            for line in file.read().decode(errors="replace").splitlines(keepends=True):
                if _REMATERIALIZED in line:
                    warnings.append(line)
                elif not ((news := _NEWS.match(line)) and news[1].endswith(_BETTER_SAID)):
                    os.write(2, line.encode())


@dataclass(frozen=True)
class Rematerialization:
    """A tensor that the partitioner gathers whole on every device, for it knows no other way from one placement to
    the next. `times` is how often the compiler said so of one place in the source."""

    tensor: str  # "bf16[8,64,128]", whole
    n_bytes: int  # of it
    given: str  # parts of each dim, "1x1x4x1"
    wanted: str
    origin: Origin
    times: int

    @property
    def hint(self) -> str:
        of = f" of dims {' x '.join(self.origin.dims)}" if self.origin.dims else ""
        return (
            f"the tensor{of} lies in {self.given} parts and is wanted in {self.wanted}, and no collective goes from "
            "the one to the other: move one axis at a time (`shard.activation` in between), or give what makes it and "
            "what reads it the same dims"
        )

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"hint": self.hint}

    def __str__(self) -> str:
        return f"{self.tensor} is gathered whole at {self.origin.where or '?'} ({self.origin.module or 'no module'})"


def rematerializations(warnings: list[str], lowered: Any) -> list[Rematerialization]:
    """What the compiler warned of, by the place in the source. `lowered` is the program that it was given."""
    if not warnings:
        return []
    sources = Sources(lowered.as_text(dialect="hlo", debug_info=True))
    found = Counter(r for line in warnings if (r := _read(line, sources)))
    return [Rematerialization(*key, times) for key, times in found.most_common()]


def _read(line: str, sources: Sources) -> tuple[str, int, str, str, Origin] | None:
    said = _SAID.search(line)
    if said is None:
        return "?", 0, "?", "?", Origin(module=line.strip()[:200])
    given, wanted, dtype, shape, metadata = said.groups()
    parts = [int(n) if n.isdecimal() else 1 for n in _parts(given).split("x")]
    local = [int(n) for n in shape.split(",") if n]
    whole = [n * parts[i] if i < len(parts) else n for i, n in enumerate(local)]
    name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', metadata)
    # The frame's number is of another table than any that can be read: only the path is told for certain.
    own = sources.origin(re.sub(r"stack_frame_id=\d+", "", metadata))
    if name and not own.where:
        alike = sources.named(name[1])
        places = sorted({o.where for o in alike})
        callers = alike[0].callers if len(places) == 1 else ()
        own = Origin(own.module, own.dims, own.phase, " or ".join(places[:2]), callers)
    n_bytes = math.prod(whole) * BITS.get(dtype, 32) // 8
    return f"{dtype}[{','.join(map(str, whole))}]", n_bytes, _parts(given), _parts(wanted), own


def _parts(sharding: str) -> str:
    """As XLA writes shardings: "{devices=[1,1,4,1]<=[4]}" -> "1x1x4x1": parts of each dim."""
    found = re.search(r"devices=\[([\d,]+)\]", sharding)
    if found is None:
        return sharding.strip("{}")
    parts = found[1].split(",")
    if "last_tile_dim_replicate" in sharding:
        parts = parts[:-1]
    return "x".join(parts)
