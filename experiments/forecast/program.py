"""The compiled program of absent devices, kept on disk by all that decides it: what was compiled once is only read."""

import dataclasses
import gzip
import hashlib
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jax

from experiments.compiler import compile_step
from experiments.data import default_cache
from experiments.diagnosis import compiler
from experiments.memory import Stats
from experiments.records import Record, write_whole


@dataclass(frozen=True)
class Program:
    """What a forecast needs of a compiled step."""

    text: str  # scheduled HLO
    memory: Stats
    warnings: list[Record]  # of tensors that the compiler gathers whole
    options: Record  # of the compiler, as taken


def program(
    lowered: jax.stages.Lowered, options: Mapping[str, Any], cluster: Sequence[jax.Device]
) -> tuple[Program, bool]:
    """The program, and whether it was kept. `options` are all of the compiler's, for some
    are not in the lowered text. What the compiler refuses raises, and is not kept. JAX_ENABLE_COMPILATION_CACHE=false
    keeps nothing."""
    keeps = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    path = _path(lowered, options, cluster)
    if keeps and (known := _read(path)):
        return known, True
    kernels = _kernels(cluster[0].platform)
    with compiler.heard() as said:
        made, taken = compile_step(lowered, {**options, **kernels})
    warnings = [w.as_json() for w in compiler.rematerializations(said, lowered)]
    taken = {name: value for name, value in taken.items() if name not in kernels}
    found = Program(str(made.as_text()), Stats.of(made.memory_analysis()), warnings, taken)
    if keeps:
        write_whole(path, gzip.compress(json.dumps(dataclasses.asdict(found)).encode(), compresslevel=3))
    return found, False


def _kernels(platform: str) -> dict[str, str]:
    """Where the compiler finds the kernels that it made for a rung before: rungs of one layout have most of them in
    common. Whose they are decides nothing in the schedule."""
    return {"xla_gpu_kernel_cache_file": str(Path(_folder().name) / "kernels")} if platform == "gpu" else {}


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Of this process alone, for as long as it runs: two that write into one file would spoil it."""
    return tempfile.TemporaryDirectory(prefix="ladder-")


def _path(lowered: jax.stages.Lowered, options: Mapping[str, Any], cluster: Sequence[jax.Device]) -> Path:
    """Named by the lowered program with its source lines, the options, the compiler, and the devices."""
    first = cluster[0]
    text = lowered.as_text(debug_info=True)
    text = re.sub(r'(@CustomSPMDPartitioning\(.*?backend_config = ")\d+', r"\1", text)  # the address of a function
    decides = hashlib.sha256(text.encode())
    for part in (
        sorted(options.items()), jax.__version__, metadata.version("jaxlib"), first.client.platform_version,
        first.device_kind, len(cluster), [getattr(d, "coords", None) for d in (first, cluster[-1])],
        resources.files("experiments.forecast").joinpath("targets.toml").read_text(),
    ):  # fmt: skip
        decides.update(repr(part).encode())
    return default_cache() / "programs" / f"{decides.hexdigest()[:32]}.json.gz"


def _read(path: Path) -> Program | None:
    """None where there is none, or one that was damaged."""
    try:
        found = json.loads(gzip.decompress(path.read_bytes()))
        return Program(found["text"], Stats(**found["memory"]), found["warnings"], found["options"])
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None
