"""Work that ends at once when its client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.types import Receive

from shared.errors import Cancelled

T = TypeVar("T")


async def unless_disconnected(receive: Receive, work: Awaitable[T]) -> T:
    """Waits for `work`, in this task, and cancels it when the client leaves.

    Args:
        receive: Of a request whose body was read: what it still tells is only that the client left.
        work: When this returns or raises it has ended.

    Raises:
        Cancelled: The client left first.
    """
    task, gone = asyncio.current_task(), asyncio.ensure_future(_gone(receive))
    assert task is not None
    has_left, cancels_before = False, task.cancelling()

    def leave(_: asyncio.Future[None]) -> None:
        nonlocal has_left
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
        gone.remove_done_callback(leave)
        gone.cancel()
        if has_left:
            task.uncancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
