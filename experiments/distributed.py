"""Join the processes of one job. The launcher says who they are, in four variables:

LADDER_N_PROCESSES        how many; without it this is a job of one process and `join` does nothing
LADDER_PROCESS_ID         which of them this is, from 0
LADDER_COORDINATOR        host:port where process 0 listens
LADDER_LOCAL_DEVICE_IDS   which accelerators of its node this process drives, such as 0,1,2,3;
                          without it, all
"""

import os

from experiments import entry
from transformer.errors import RequestError

_PATIENCE_S = 30
"""How long a silent peer counts as alive, and how long a finished one waits for the others. JAX's own
100 s and 300 s are a long time for a whole cluster to hang; heartbeats have a thread of their own, so
that compiling delays none."""


def join() -> None:
    """Make one job of this process and its peers; afterwards `jax.devices()` is those of all.

    Call before anything touches a device. From here on an uncaught exception ends the process at
    once, so that its peers see it; a normal exit leaves by JAX's own exit hook, which waits for the
    peers. RequestError names a variable that is missing or wrong.
    """
    if "LADDER_N_PROCESSES" not in os.environ:
        return
    n_processes, process_id = _whole("LADDER_N_PROCESSES"), _whole("LADDER_PROCESS_ID")
    if process_id >= n_processes:
        raise RequestError(f"LADDER_PROCESS_ID={process_id} is not below LADDER_N_PROCESSES={n_processes}")
    coordinator = os.environ.get("LADDER_COORDINATOR", "")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise RequestError(f"LADDER_COORDINATOR={coordinator!r}: expected host:port, such as 127.0.0.1:61440")
    entry.die_with_traceback()

    import jax

    jax.distributed.initialize(
        coordinator_address=coordinator,
        num_processes=n_processes,
        process_id=process_id,
        local_device_ids=_device_ids(),
        cluster_detection_method="deactivate",  # under Slurm it would hide all GPUs but one
        heartbeat_timeout_seconds=_PATIENCE_S,
        shutdown_timeout_seconds=_PATIENCE_S,
        # By default it listens on every interface, also where all peers are on this machine.
        coordinator_bind_address=coordinator if host in ("127.0.0.1", "localhost") else None,
    )


def is_lead() -> bool:
    """Whether this process writes what the job writes once: it is process 0, or alone."""
    return "LADDER_N_PROCESSES" not in os.environ or _whole("LADDER_PROCESS_ID") == 0


def _whole(name: str) -> int:
    text = os.environ.get(name)
    if text is None:
        raise RequestError(f"LADDER_N_PROCESSES is set and {name} is not: launch.submit sets both")
    if not text.isdecimal():
        raise RequestError(f"{name}={text!r}: expected a whole number")
    return int(text)


def _device_ids() -> list[int] | None:
    text = os.environ.get("LADDER_LOCAL_DEVICE_IDS")
    if text is None:
        return None
    if not all(item.isdecimal() for item in text.split(",")):
        raise RequestError(f"LADDER_LOCAL_DEVICE_IDS={text!r}: expected device numbers with commas, such as 0,1,2,3")
    return [int(item) for item in text.split(",")]
