"""Waiting for what must end before anything else happens, cancelled or not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Sequence
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


async def all_or_none(works: Sequence[Coroutine[None, None, None]]) -> None:
    """Does all at the same time. If one fails, or the calling task is cancelled, the others are cancelled.

    On return, in whatever way, every one has ended.

    Raises:
        Exception: That of the first one that failed.
    """
    if len(works) == 1:
        await works[0]
        return
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await settle(asyncio.wait(tasks))
