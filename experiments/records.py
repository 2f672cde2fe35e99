"""Records: one JSON object per rung in `records.jsonl`, the only thing that crosses from running
to reporting. This file is the schema; it imports no JAX.

Keys (`*` may be null):

    schema                    1
    kind                      "measured" | "forecast"
    preset                    slug
    model, config             resolved ModelConfig, resolved request: flat objects
    device                    slug of hardware.toml; measured ones also `device_kind` as JAX says it
    n_devices, layout         {"data": 4, "fsdp": 2, "tensor": 1, ..., "zero": 3, "microbatches": 1,
                               "remat": "full", "precision": "bf16", "weights": "f32",
                               "optimizer": "device", "attention": "cudnn"};
                              of dropless experts also "experts": "grouped"
    scaling                   "weak" | "strong"
    micro_batch_seqs          sequences of one data shard in one forward pass
    global_batch_seqs*, seq_len
    step_s*                   {"median": s, "low": s, "high": s}, p10 and p90 of steps; measured also "all": [s, ...];
                              forecasts' is the 80 % range of back-tests
    compile_s*                seconds to lower and compile, or with `compile_kept` to read what was compiled before
    tokens_per_s*, tokens_per_s_per_device*
    mfu*                      {"full": fraction, "causal": fraction}: attention counted whole, or its causal half; of
                              the bf16 peak where precision is fp8 or int8 (hfu too)
    hfu*                      fraction, recomputation counted, attention as the hardware runs it
    memory_bytes*             bytes per device by class, with "total" (its sum) and "limit"; beside them "host": bytes
                              in the host's memory
    fits*                     total <= limit; a verdict, not an error
    energy_j*                 joules per step, all devices; null where the device publishes no watts
    warnings*                 tensors that the compiler gathered whole on every device, involuntarily, each with its
                              place in the source and a hint; null where a measured program was only read
    failed                    null, or the reason; then the numbers are null
    versions, commit, command, created
    forecast only:            method, compiled_for, breakdown_s (adds up to the step), hidden_s, facts, assumed,
                              collective_bytes: {"tensor all-gather": bytes, ...} of one device's whole arrays,
                              hardware_flops_per_token (as compiled, over all devices)
    measured only:            device_kind, peak_bytes*: the most that one device held, loss* of the last step,
                              note*: what a reader must know ("8 virtual devices share 2 cores")

Of records of the same rung in one folder the latest counts: `rung_key` says what the same is.
"""

import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from transformer.errors import RequestError

SCHEMA = 1
FILE = "records.jsonl"
Record = dict[str, Any]

_REQUIRED: dict[str, type] = {
    "schema": int,
    "kind": str,
    "preset": str,
    "model": dict,
    "device": str,
    "n_devices": int,
    "layout": dict,
    "scaling": str,
    "seq_len": int,
}


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: a temporary neighbour, then one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide a report from its readers
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def check_out(folder: Path) -> None:
    """RequestError unless files can be made in `folder`, which need not be there. Makes nothing."""
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not there.is_dir():
        raise RequestError(f"--out={folder}: {there} is a file; expected a folder, or a name that is free")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RequestError(f"--out={folder}: {there} is not writable; choose another --out")


def append(folder: Path, record: Record) -> None:
    """Append one record as one line: a reader never sees half of it."""
    check(record, where="new record")
    check_out(folder)
    append_line(folder / FILE, record)


def append_line(path: Path, entry: Mapping[str, Any]) -> None:
    """Append an entry of any kind to a file of JSON lines, in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(entry, allow_nan=False, sort_keys=False) + "\n"
    with open(path, "ab", buffering=0) as file:
        file.write(line.encode())
        os.fsync(file.fileno())


def check(record: Any, *, where: str) -> None:
    """RequestError unless `record` has the keys that every reader relies on."""
    if not isinstance(record, dict):
        raise RequestError(f"{where}: a record is a JSON object, not {type(record).__name__}")
    for key, expected in _REQUIRED.items():
        if not isinstance(record.get(key), expected) or isinstance(record.get(key), bool):
            raise RequestError(f"{where}: key {key!r} is {record.get(key)!r}, expected {expected.__name__}")
    if record["schema"] != SCHEMA:
        raise RequestError(f"{where}: schema {record['schema']}, this version reads {SCHEMA}")
    if record["kind"] not in ("measured", "forecast"):
        raise RequestError(f"{where}: kind {record['kind']!r}, expected 'measured' or 'forecast'")
    if record.get("failed") is None and not isinstance(record.get("step_s"), dict):
        raise RequestError(f"{where}: neither step_s nor a reason in failed")


def rung_key(record: Record) -> str:
    """What makes two records the same rung: all that was asked for, nothing that was found."""
    names = ("kind", "preset", "model", "device", "n_devices", "layout", "scaling", "seq_len", "global_batch_seqs")
    return json.dumps([record.get(name) for name in names], sort_keys=True)


def read_all(folder: Path) -> Iterator[Record]:
    """Every record of a folder in order. RequestError names the line that is not one."""
    path = folder / FILE
    if not path.is_file():
        raise RequestError(
            f"no {FILE} in {str(folder)!r}: run experiments.ladder or experiments.forecast with --out={folder}"
        )
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode())
        except json.JSONDecodeError as error:
            raise RequestError(f"{path}:{number}: not a JSON object ({error.msg} at column {error.colno})") from None
        except UnicodeDecodeError as error:
            raise RequestError(f"{path}:{number}: not text ({error.reason} at column {error.start + 1})") from None
        check(record, where=f"{path}:{number}")
        yield record


def read(folder: Path) -> list[Record]:
    """The records that count: the latest of each rung, in the order of first appearance."""
    return list({rung_key(record): record for record in read_all(folder)}.values())


def provenance() -> Record:
    """Who made a record: versions of what computes, the project's commit, the command, the time (UTC)."""
    packages = ("jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda13-plugin")
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "versions": versions,
        "commit": _commit(),
        "command": shlex.join(["python", "-m", _module_name(), *sys.argv[1:]]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name


def _commit() -> str | None:
    """The checkout's commit, with "+" where files differ from it; null outside a checkout."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if dirty.strip() else "")


def chosen(layout: Mapping[str, Any]) -> dict[str, int]:
    """Of a record's layout what differs from a single device, which is split and staged by nothing."""
    usual = {"zero": 3, "ring": 0, "microbatches": layout.get("microbatches")}
    return {k: v for k, v in layout.items() if isinstance(v, int) and v != usual.get(k, 1)}


def layout_text(layout: Mapping[str, Any]) -> str:
    """The layout as `--layout` takes it.

    >>> layout_text({"data": 1, "fsdp": 128, "tensor": 8, "zero": 1, "microbatches": 4, "remat": "full"})
    'fsdp=128,tensor=8,zero=1'
    """
    return ",".join(f"{name}={value}" for name, value in chosen(layout).items()) or "data=1"
