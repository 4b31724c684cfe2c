"""`tandem down`: stops a cluster whose supervisor is elsewhere, or what such a one left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from rich.console import Console

from services.cli.display import Display
from services.cli.run_directory import supervisor_pid
from services.cli.running import kill_processes
from services.cli.state_file import ClusterState, living, read_state, remove_leftovers

_POLL_S = 0.05
# The supervisor bounds each stage of its shutdown; this is more than their sum.
_SUPERVISOR_S = 90.0
_ORPHANS_S = 10.0


def down(run_dir: Path, console: Console) -> bool:
    """Stops the cluster in `run_dir` and returns when nothing of it is left; False when there was none."""
    state = read_state(run_dir)
    if supervisor_pid(run_dir) is None:
        if state is None:
            return False
        _end_orphans(state, console)
        return True
    with Display(console) as display:
        if state is not None:
            display.adopt(state)
        if not _end_supervisor(run_dir, display):
            console.print("[yellow]the supervisor does not stop; killing it[/]")
            _end_supervisor(run_dir, display, number=signal.SIGKILL)
    if state is not None and living(state.processes):
        _end_orphans(state, console)
    return True


def _end_supervisor(run_dir: Path, display: Display, number: signal.Signals = signal.SIGTERM) -> bool:
    """Signals it and waits; False when it is still there after all."""
    signalled: int | None = None
    deadline_s = time.monotonic() + _SUPERVISOR_S
    while (pid := supervisor_pid(run_dir)) is not None:
        if time.monotonic() > deadline_s:
            return False
        if pid != signalled:
            signalled = pid
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if state := read_state(run_dir):
            display.show(state)
        time.sleep(_POLL_S)
    return True


def _end_orphans(state: ClusterState, console: Console) -> None:
    """They got SIGTERM when their supervisor died; what does not follow it is killed."""
    deadline_s = time.monotonic() + _ORPHANS_S
    while living(state.processes) and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
    if pids := kill_processes(state):
        console.print(f"killed {len(pids)} processes that outlived their supervisor", highlight=False)
    remove_leftovers(state)
