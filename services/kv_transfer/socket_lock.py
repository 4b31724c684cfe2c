"""One kv_transfer per socket. Whoever holds the lock knows that its predecessor, and with it its UCX, is gone."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

from shared.errors import ConfigurationError

WAIT_S = 20.0
_RETRY_S = 0.1


@contextlib.asynccontextmanager
async def locked_socket(socket: Path, *, wait_s: float = WAIT_S) -> AsyncIterator[None]:
    """Holds an exclusive lock beside `socket`; the kernel gives it back when the process ends, however it ends.

    Args:
        socket: Need not exist.
        wait_s: How long a predecessor may take to finish.

    Raises:
        ConfigurationError: Another process keeps the lock, or the directory cannot be written.
    """
    lock = socket.with_name(socket.name + ".lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise ConfigurationError(f"cannot open {lock}: {exc}") from exc
    try:
        deadline_s = time.monotonic() + wait_s
        while not _try_lock(descriptor):
            if time.monotonic() > deadline_s:
                raise ConfigurationError(f"another kv_transfer serves {socket}: it holds {lock}")
            await asyncio.sleep(_RETRY_S)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
