"""This machine: the ranks of a job are processes on loopback that JAX joins, as it does on a cluster."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import IO

from launch.spec import Job

_TAIL_LINES = 25  # XLA's abort prints fifteen lines after the one that names the dead peer
_POLL_S = 0.05
_ECHO_S = 0.5


def rank_envs(job: Job, coordinator: str) -> Iterator[dict[str, str]]:
    """What each rank's environment adds to the launcher's own."""
    for rank in range(job.n_processes):
        first = rank * job.devices_per_process
        yield {
            **job.shared_env(),
            "LADDER_COORDINATOR": coordinator,
            "LADDER_PROCESS_ID": str(rank),
            "LADDER_LOCAL_DEVICE_IDS": ",".join(map(str, range(first, first + job.devices_per_process))),
        }


def render(job: Job) -> str:
    """The command line of every rank, to be pasted into as many terminals once PORT is a number."""
    lines = []
    for env in rank_envs(job, "127.0.0.1:PORT"):
        setting = " ".join(f"{key}={shlex.quote(value)}" for key, value in env.items())
        lines.append(f"{setting} {shlex.join(job.argv)}\n")
    return "".join(lines)


def submit(jobs: Sequence[Job], folder: Path) -> int:
    """Run the rungs one after the other and wait. Returns how many failed; the reasons go to stderr."""
    n_failed = 0
    for job in jobs:
        print(f"{job.folder.name}: {job.n_processes} processes, logs in {job.folder}", flush=True)
        if reason := run(job):
            n_failed += 1
            print(f"{job.folder.name}: {reason}", file=sys.stderr, flush=True)
    return n_failed


def run(job: Job, *, grace_s: float = 5.0) -> str | None:
    """Run one job to its end: None, or why it failed, with the last lines of that rank's log.

    Each rank's output goes to `job.folder`/rank-N.log, a line at a time, behind its rank; rank 0's
    is shown here too. When one rank fails the others get SIGTERM, and SIGKILL after `grace_s`:
    JAX's own SIGTERM handler only takes note, so a rank that waits for a dead peer ignores it.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    ended: SimpleQueue[tuple[int, int]] = SimpleQueue()
    ranks: list[_Rank] = []
    try:
        for rank, env in enumerate(rank_envs(job, f"127.0.0.1:{_free_port()}")):
            ranks.append(_Rank(rank, job, env, ended))
        for _ in range(job.n_processes):
            rank, code = ended.get()
            if code:
                rank, code = _first_cause([(rank, code), *_others(ended)])
                return ranks[rank].obituary(code)
        return None
    except OSError as error:
        return f"cannot run {job.argv[0]!r}: {error.strerror}"
    finally:
        _stop(ranks, grace_s)


def _others(ended: "SimpleQueue[tuple[int, int]]") -> list[tuple[int, int]]:
    """The failures that follow on the heels of the first: peers see a dead rank at once, and die of it."""
    time.sleep(_ECHO_S)
    found = []
    while not ended.empty():
        found.append(ended.get())
    return [(rank, code) for rank, code in found if code]


def _first_cause(failures: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Of ranks that ended together, one that was killed: an exit, or JAX's abort, may be only its echo."""
    return min(failures, key=lambda failure: failure[1] >= 0 or -failure[1] == signal.SIGABRT)


class _Rank:
    """One process, a thread that copies its output, and a thread that waits for its end."""

    def __init__(self, rank: int, job: Job, env: dict[str, str], ended: "SimpleQueue[tuple[int, int]]") -> None:
        self.rank, self.log, self.tail = rank, job.folder / f"rank-{rank}.log", deque[str](maxlen=_TAIL_LINES)
        # Its own session: the signals of _stop then reach what the rank has started, too.
        self.process = subprocess.Popen(
            job.argv, env=os.environ | env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self._copier = threading.Thread(target=self._copy, args=(self.process.stdout,), daemon=True)
        # The end of a process is not the end of its output: a child that outlives it holds the pipe.
        self._waiter = threading.Thread(target=lambda: ended.put((rank, self.process.wait())), daemon=True)
        self._copier.start()
        self._waiter.start()

    def _copy(self, output: IO[str]) -> None:
        with output, open(self.log, "a", encoding="utf-8", buffering=1) as log:
            for line in output:
                text = f"[{self.rank}] {line.rstrip()}"
                self.tail.append(text)
                print(text, file=log)
                if self.rank == 0:
                    print(text, flush=True)

    def obituary(self, code: int) -> str:
        self._copier.join(timeout=1)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return "\n  ".join([f"rank {self.rank} {how}; the end of {self.log}:", *self.tail])

    def send(self, number: signal.Signals) -> None:
        """To the rank's whole session, which may outlive the rank itself."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return

    def join(self) -> None:
        self._waiter.join()
        self._copier.join(timeout=1)  # what has left the session may hold the pipe for ever


def _stop(ranks: Sequence[_Rank], grace_s: float) -> None:
    for rank in ranks:
        rank.send(signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and any(rank.process.poll() is None for rank in ranks):
        time.sleep(_POLL_S)
    for rank in ranks:
        rank.send(signal.SIGKILL)
    for rank in ranks:
        rank.join()


def _free_port() -> int:
    """A port that was free a moment ago; whoever takes it in between makes rank 0 fail with its name."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
