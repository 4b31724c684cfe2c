"""Waiting for what must end before anything else happens, cancelled or not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def settle(awaitable: Awaitable[T]) -> T:
    """Waits until `awaitable` has ended, even while the calling task is being cancelled; then raises the cancellation.

    For closing an endpoint, and for copies that a thread is making into memory that the caller gave. Bounded only by
    what is awaited.
    """
    work = asyncio.ensure_future(awaitable)
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError as exc:
            cancelled = exc
        except Exception:
            break  # the work's own failure: raised below
    if cancelled is not None:
        if not work.cancelled():
            work.exception()
        raise cancelled
    return work.result()
