"""Work that ends at once when its client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from shared.errors import Cancelled

T = TypeVar("T")


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Runs `work`, cancels it when the client leaves.

    Args:
        receive: Of a request whose body was read: what it still tells is only that the client left.
        work: Started here; when this returns or raises it has ended.

    Raises:
        Cancelled: The client left first.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    gone.add_done_callback(lambda _: task.cancel())
    try:
        return await task
    except asyncio.CancelledError:
        current = asyncio.current_task()
        if gone.done() and not (current and current.cancelling()):
            raise Cancelled("the client left") from None
        raise
    finally:
        gone.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
