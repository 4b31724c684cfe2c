"""Stops one thread of a process, which goes on otherwise: how a wedge looks from outside.

By ptrace(2), for which Linux may want root. The calls must come from one thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_SEIZE, _INTERRUPT, _DETACH = 0x4206, 0x4207, 17
_ALL_THREADS = 0x40000000  # __WALL
_EPOLL_WAIT = {"x86_64": "232", "aarch64": "22"}
_POLL_MS = 1000  # of `UcxEngine`, and of no other thread
_LOOK_S = 0.3

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def data_plane_thread(pid: int) -> int:
    """The thread of a kv_transfer that owns UCX, known by how it sleeps.

    Raises:
        LookupError: None sleeps like that just now.
    """
    for task in Path(f"/proc/{pid}/task").iterdir():
        fields = (task / "syscall").read_text().split()
        if fields[0] == _EPOLL_WAIT.get(platform.machine()) and int(fields[4], 16) == _POLL_MS:
            return int(task.name)
    raise LookupError(f"no thread of process {pid} sleeps as the data plane's does")


def busiest_thread(pid: int) -> int:
    """The thread of a process that computes most just now: of a worker at work, its engine."""
    spent = _spent(pid)
    return max(spent, key=spent.__getitem__)


def cpu_share(pid: int) -> float:
    """Cores that a process keeps busy just now."""
    return sum(_spent(pid).values())


def _spent(pid: int) -> dict[int, float]:
    """Share of a core that each thread takes, looked at for a while."""
    before = _ticks(pid)
    time.sleep(_LOOK_S)
    per_tick = 1 / os.sysconf("SC_CLK_TCK") / _LOOK_S
    return {thread: (ticks - before.get(thread, 0)) * per_tick for thread, ticks in _ticks(pid).items()}


def _ticks(pid: int) -> dict[int, int]:
    """Processor time of each thread, in clock ticks."""
    times = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        times[int(task.name)] = int(fields[11]) + int(fields[12])
    return times


@contextlib.contextmanager
def frozen(thread_id: int) -> Iterator[Callable[[], bool]]:
    """The thread stands still as long as the context is open; gives a function that says whether it was ended.

    Nobody else hears of the end of its process before that function was called.

    Raises:
        PermissionError: Linux does not let this process do it.
    """
    for request in (_SEIZE, _INTERRUPT):
        if _libc.ptrace(request, thread_id, None, None):
            raise PermissionError(os.strerror(ctypes.get_errno()))
    os.waitpid(thread_id, _ALL_THREADS)
    try:
        yield lambda: os.waitpid(thread_id, _ALL_THREADS | os.WNOHANG)[0] == thread_id
    finally:
        _libc.ptrace(_DETACH, thread_id, None, None)
