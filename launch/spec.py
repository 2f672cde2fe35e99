"""One frozen job spec. A ladder's TOML file becomes one job a rung; every cluster renders the same jobs.

name = "tiny-cpu"           names the jobs
out = "runs/tiny-cpu"       rung N lives in OUT/rung-000N; the collected records in OUT
verb = "ladder"             experiments.<verb>
devices = [2, 4]            one rung each
devices_per_process = 1     accelerators that one process drives
processes_per_node = 1      a rung with fewer processes takes part of one node
python = "python"           interpreter on the cluster; by default the one that submits
[flags]                     --key=value of the verb; `model.n_layers = 4` is --model.n_layers=4
[env]                       environment of every process
[slurm]                     sbatch options by name (SBATCH_OPTIONS); `setup`: shell lines before the
                            job; `extra`: sbatch options that have no name here, as "--name=value"
"""

import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformer.errors import RequestError, nearest

VERBS = ("ladder", "train")
"""The verbs that run as several processes."""

SBATCH_OPTIONS = (
    "account", "clusters", "comment", "constraint", "cpus_per_task", "exclude", "exclusive", "gpus_per_node", "gres",
    "licenses", "mail_type", "mail_user", "mem", "mem_per_cpu", "mem_per_gpu", "nice", "nodelist", "partition", "qos",
    "reservation", "signal", "switches", "time", "wckey",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """What a Slurm job needs beyond its processes."""

    options: Mapping[str, str | int | bool] = field(default_factory=dict)
    setup: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Job:
    """One rung: `n_processes` equal processes that run `argv` together."""

    name: str
    folder: Path
    argv: tuple[str, ...]
    n_processes: int
    processes_per_node: int
    devices_per_process: int
    env: Mapping[str, str] = field(default_factory=dict)
    slurm: Slurm = field(default_factory=Slurm)

    def shared_env(self) -> dict[str, str]:
        """The environment that all processes share. JAX_NUM_CPU_DEVICES counts where devices are
        virtual; accelerators ignore it."""
        ours = {"LADDER_N_PROCESSES": self.n_processes, "JAX_NUM_CPU_DEVICES": self.devices_per_process}
        return {**self.env, **{key: str(value) for key, value in ours.items()}}


@dataclass(frozen=True, kw_only=True)
class LadderSpec:
    """A ladder as its TOML file says it; `read` has checked every value."""

    name: str
    out: str
    devices: tuple[int, ...]
    verb: str = "ladder"
    devices_per_process: int = 1
    processes_per_node: int = 1
    python: str = sys.executable
    flags: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    slurm: Slurm = field(default_factory=Slurm)

    @property
    def folder(self) -> Path:
        return Path(self.out)

    def jobs(self) -> tuple[Job, ...]:
        """One job a rung, in the order of `devices`."""
        return tuple(self._job(n) for n in self.devices)

    def _job(self, n_devices: int) -> Job:
        folder = self.folder / f"rung-{n_devices:04d}"
        n_processes = n_devices // self.devices_per_process
        command = (self.python, "-m", f"experiments.{self.verb}")
        return Job(
            name=f"{self.name}-{n_devices:04d}",
            folder=folder,
            argv=(*command, f"--devices={n_devices}", f"--out={folder}", *_flags(self.flags)),
            n_processes=n_processes,
            processes_per_node=min(self.processes_per_node, n_processes),
            devices_per_process=self.devices_per_process,
            env=self.env,
            slurm=self.slurm,
        )


def read(path: Path) -> LadderSpec:
    """The spec in a TOML file. RequestError names the file, the value and what was expected."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} is not TOML: {error}") from None
    try:
        return parse(table)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None


def parse(table: Mapping[str, Any]) -> LadderSpec:
    """The spec that a TOML table describes. Raises RequestError."""
    known = [f.name for f in fields(LadderSpec)]
    _known_keys("key", table, known)
    for key in ("name", "out", "devices"):
        if key not in table:
            raise RequestError(f"{key} is missing; a ladder needs name, out and devices")
    values = {key: _typed(key, value) for key, value in table.items()}
    values["slurm"] = _slurm(values.get("slurm", {}))
    values["devices"] = tuple(values["devices"])
    spec = LadderSpec(**values)
    _check_text(spec)
    _check_counts(spec)
    list(_flags(spec.flags))  # raises on a key or value that cannot be a flag
    return spec


def _known_keys(what: str, given: Mapping[str, Any], known: list[str] | tuple[str, ...]) -> None:
    for key in given:
        if key not in known:
            raise RequestError(f"unknown {what} {key!r}: {nearest(key, known)}")


def _typed(key: str, value: Any) -> Any:
    kind = _KIND_OF.get(key, str)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise RequestError(f"{key} = {value!r}: expected {_KINDS[kind]}")
    return value


_KIND_OF: Mapping[str, type] = {
    "devices": list, "devices_per_process": int, "processes_per_node": int, "flags": dict, "env": dict, "slurm": dict,
}  # fmt: skip
_KINDS = {str: "text in quotes", int: "a whole number", list: "a list", dict: "a table"}


def _slurm(table: Mapping[str, Any]) -> Slurm:
    _known_keys("key of [slurm]", table, (*SBATCH_OPTIONS, "setup", "extra"))
    lines = {key: table.get(key, []) for key in ("setup", "extra")}
    for key, value in lines.items():
        if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
            raise RequestError(f"[slurm] {key} = {value!r}: expected a list of text in quotes")
    for line in lines["extra"]:
        if not line.startswith("--"):
            raise RequestError(f"[slurm] extra = {line!r}: expected an sbatch option such as '--hint=nomultithread'")
    options = {key: value for key, value in table.items() if key not in lines}
    for key, value in options.items():
        if not isinstance(value, str | int) or value is False:
            raise RequestError(f"[slurm] {key} = {value!r}: expected text in quotes, a whole number or true")
        _check_line(f"[slurm] {key}", str(value))
    return Slurm(options=options, setup=tuple(lines["setup"]), extra=tuple(lines["extra"]))


def _check_text(spec: LadderSpec) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", spec.name):
        raise RequestError(f"name = {spec.name!r}: expected letters, digits, '-', '_' and '.'")
    if spec.verb not in VERBS:
        raise RequestError(f"verb = {spec.verb!r} does not run on clusters; {nearest(spec.verb, VERBS)}")
    for key, text in (("out", spec.out), ("python", spec.python)):
        _check_line(key, text)
        if not text:
            raise RequestError(f"{key} = '' is empty")
    if "\\" in spec.out:
        raise RequestError(f"out = {spec.out!r}: a backslash switches Slurm's file name patterns off; use '/'")
    for key, value in spec.env.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            raise RequestError(f"[env] {key!r} is not a variable's name")
        if key.startswith("LADDER_") or key == "JAX_NUM_CPU_DEVICES":
            raise RequestError(f"[env] {key} is set by the launcher; use devices and devices_per_process")
        if not isinstance(value, str):
            raise RequestError(f"[env] {key} = {value!r}: expected text in quotes")
        _check_line(f"[env] {key}", value)
    for line in (*spec.slurm.setup, *spec.slurm.extra):
        _check_line("[slurm]", line)


def _check_line(key: str, text: str) -> None:
    """Quoting carries spaces, quotes and dollars; a line break would end a `#SBATCH` line, and the
    other control characters no shell and no log shows."""
    if not text.isprintable():
        raise RequestError(f"{key} = {text!r}: line breaks and control characters are not allowed")


def _check_counts(spec: LadderSpec) -> None:
    per_process, per_node = spec.devices_per_process, spec.processes_per_node
    if not spec.devices:
        raise RequestError("devices = []: expected one count a rung, such as [2, 4, 8]")
    for key, value in [("devices", n) for n in spec.devices] + [
        ("devices_per_process", per_process),
        ("processes_per_node", per_node),
    ]:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RequestError(f"{key}: {value!r} is not a count of one or more")
    if repeated := {n for n in spec.devices if spec.devices.count(n) > 1}:
        raise RequestError(f"devices = {list(spec.devices)} has {min(repeated)} twice")
    for n in spec.devices:
        if n % per_process:
            raise RequestError(
                f"devices: {n} is not a multiple of devices_per_process = {per_process}; "
                f"the nearest are {n - n % per_process or per_process} and {n - n % per_process + per_process}"
            )
        if (n_processes := n // per_process) > per_node and n_processes % per_node:
            raise RequestError(
                f"devices: {n} makes {n_processes} processes, not a multiple of processes_per_node = {per_node}; "
                f"whole nodes have {per_process * per_node} devices"
            )


def _flags(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """`{"steps": 8, "model": {"n_layers": 4}}` -> --steps=8 --model.n_layers=4"""
    for key, value in table.items():
        name = prefix + key
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]*", name):
            raise RequestError(f"[flags] {name!r} is not a flag's name: flags are written with underscores")
        if name in ("out", "devices"):
            raise RequestError(f"[flags] {name} differs by rung: set {name} at the top of the file")
        if isinstance(value, Mapping):
            yield from _flags(value, f"{name}.")
            continue
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str | int | float) for item in items):
            raise RequestError(f"[flags] {name} = {value!r}: expected text, a number, true, false or a list of them")
        text = ",".join(str(item).lower() if isinstance(item, bool) else str(item) for item in items)
        _check_line(f"[flags] {name}", text)
        yield f"--{name}={text}"
