"""Notices a thread that never sleeps any more.

UCX has a thread of its own, which waits for connections. Whoever says more on connecting than UCX has room for leaves
it a socket that stays readable and that it never reads: it then turns at the cost of a core, for as long as the process
lives, while everything else works. Linux counts how often a thread let go of its core by itself; one that could have
run at two looks and did not let go in between has not slept.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

UCX_THREAD = "async"

_TASKS = Path("/proc/self/task")


class SleeplessThread:
    """Watches the thread of a name.

    Args:
        name: As Linux shows it. Where there are several, one of them.
        clock: Seconds.
        tasks: Of the process; as in proc(5).
    """

    def __init__(self, name: str, *, clock: Callable[[], float] = time.monotonic, tasks: Path = _TASKS) -> None:
        self._name = name
        self._clock = clock
        self._tasks = tasks
        self._task: Path | None = None
        self._sleeps: str | None = None
        self._awake_since_s = 0.0

    def awake_s(self) -> float:
        """How long it has not slept, by the looks so far, of which this is one; 0 also if there is no such thread."""
        sleeps, now_s = self._sleeps_if_running(), self._clock()
        if sleeps is None or sleeps != self._sleeps:
            self._awake_since_s = now_s
        self._sleeps = sleeps
        return now_s - self._awake_since_s

    def _sleeps_if_running(self) -> str | None:
        try:
            self._task = self._task or self._find()
            if self._task is None:
                return None
            fields = dict(line.split(":\t", 1) for line in (self._task / "status").read_text().splitlines())
        except (OSError, ValueError):
            self._task = None
            return None
        return fields.get("voluntary_ctxt_switches") if fields.get("State", "").startswith("R") else None

    def _find(self) -> Path | None:
        return next((task for task in self._tasks.iterdir() if _name(task) == self._name), None)


def _name(task: Path) -> str:
    try:
        return (task / "comm").read_text().strip()
    except OSError:  # it ended
        return ""
