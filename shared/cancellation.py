"""Whose cancellation it is."""

from __future__ import annotations

import asyncio


def is_being_cancelled() -> bool:
    """Somebody cancelled the running task; else a `CancelledError` is of what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
