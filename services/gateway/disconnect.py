"""Work that ends at once when its client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.types import Scope

from services.gateway.http_protocol import GONE
from shared.errors import Cancelled

T = TypeVar("T")


async def unless_disconnected(scope: Scope, work: Awaitable[T]) -> T:
    """Waits for `work`, in this task, and cancels it when the client leaves.

    Args:
        scope: The request's.
        work: When this returns or raises it has ended.

    Raises:
        Cancelled: The client left first.
    """
    task, gone = asyncio.current_task(), scope[GONE]
    assert task is not None
    has_ended, has_left, cancels_before = False, False, task.cancelling()

    def leave(_: asyncio.Future[None]) -> None:
        nonlocal has_left
        if not has_ended:  # this was on its way already when `work` ended
            has_left = True
            task.cancel()

    gone.add_done_callback(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if has_left and task.cancelling() == cancels_before + 1:  # nobody else cancels it too
            raise Cancelled("the client left") from None
        raise
    finally:
        has_ended = True
        gone.remove_done_callback(leave)
        if has_left:
            task.uncancel()
