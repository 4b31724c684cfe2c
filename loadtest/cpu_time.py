"""CPU time of a running suite, by process: main threads apart, which are the event loops, from the others.

Of an engine worker the others are the step thread and the kernels' helpers, and a little of gRPC; elsewhere all but
nothing. Linux counts nanoseconds per thread.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

_NS = 1e9

CpuTime = Counter[tuple[str, str]]
"""Seconds by (process name, "event loop" or "other threads"); of the caller's process as ("client", "all")."""


def cpu_time(run_dir: Path) -> CpuTime:
    """What a suite and the caller have used so far.

    Args:
        run_dir: Of the suite, which must not lose a process meanwhile.
    """
    state = json.loads((run_dir / "state.json").read_text())
    pids = {process["name"]: process["pid"] for process in state["processes"]}
    pids["supervisor"] = state["supervisor_pid"]
    seconds = CpuTime()
    for name, pid in pids.items():
        for task in Path(f"/proc/{pid}/task").iterdir():
            kind = "event loop" if int(task.name) == pid else "other threads"
            seconds[name, kind] += _thread_s(task)
    seconds["client", "all"] = time.process_time()
    return seconds


def _thread_s(task: Path) -> float:
    """0 for a thread that just ended."""
    try:
        return int((task / "schedstat").read_text().split()[0]) / _NS
    except FileNotFoundError:
        return 0.0
