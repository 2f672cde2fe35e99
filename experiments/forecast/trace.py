"""A simulated step as a timeline that Perfetto (ui.perfetto.dev) opens: Chrome's trace events, compressed.

Threads are the compute stream and every stream of communication by mesh axis. Of a loop the iterations that were played
are shown; one slice stands for the rest, and `times` says of what is shown how many executions it stands for.
"""

import gzip
import json
from pathlib import Path
from typing import Any

from experiments.forecast.timeline import Span, Timeline
from experiments.records import write_whole
from experiments.timelines import module_path

_PROCESS = 1


def write(path: Path, timeline: Timeline, title: str) -> None:
    """Write a timeline that was played with its spans kept."""
    assert timeline.spans is not None
    threads = sorted({span.thread for span in timeline.spans}, key=lambda thread: (thread != "compute", thread))
    events = [_named("process_name", 0, title)]
    events += [_named("thread_name", i, thread) for i, thread in enumerate(threads)]
    events += [_event(span, threads.index(span.thread)) for span in timeline.spans]
    write_whole(path, gzip.compress(json.dumps({"displayTimeUnit": "ms", "traceEvents": events}).encode()))


def _named(what: str, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": _PROCESS, "tid": thread, "name": what, "args": {"name": name}}


def _event(span: Span, thread: int) -> dict[str, Any]:
    args: dict[str, Any] = {"category": span.category}
    if span.category not in ("loop", "folded") and not span.category.startswith("exposed"):
        args |= {"hlo_op": span.name, "tf_op": span.op_name, "times": span.times, "run_id": "0"}
    args |= {key: value for key, value in (("flops", span.flops), ("bytes", span.n_bytes)) if value}
    return {
        "ph": "X", "pid": _PROCESS, "tid": thread, "ts": span.begin_s * 1e6, "dur": span.seconds * 1e6,
        "name": module_path(span.op_name) or span.name, "args": args,
    }  # fmt: skip
