"""Whose cancellation it is, and that none is lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator


def is_being_cancelled() -> bool:
    """Somebody cancelled the running task; else a `CancelledError` is of what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


@contextlib.contextmanager
def keeping_cancellation() -> Iterator[None]:
    """Raises the running task's cancellation if what is awaited inside swallowed it.

    `asyncio.wait_for` of Python 3.11, which libraries use, does: it returns a result that comes in the same turn of the
    event loop. A task that repeats something for ever would then never end, nor whoever cancelled it and waits.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    try:
        yield
    except asyncio.CancelledError:
        raise
    except BaseException as exc:
        if task and task.cancelling() > before:
            raise asyncio.CancelledError from exc
        raise
    if task and task.cancelling() > before:
        raise asyncio.CancelledError
