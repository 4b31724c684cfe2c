"""The worker's pulls that are under way, by number: so that it can have the end of one proven that it lost sight of."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator

from shared.errors import InvalidRequest

_REMEMBERED = 4096  # ended before they began; a call is never that far behind


PullKey = tuple[str, int]


class OpenPulls:
    """Owned by the event loop. A pull's key is the worker's incarnation and the number that it gave the pull."""

    def __init__(self) -> None:
        self._running: dict[PullKey, tuple[asyncio.Task[object], asyncio.Future[None]]] = {}
        self._ended: dict[PullKey, None] = {}

    @contextlib.contextmanager
    def running(self, key: PullKey) -> Iterator[None]:
        """While the context is open, the calling task is that pull; a number of 0 is nobody's.

        Raises:
            InvalidRequest: The worker has given this pull up already, or the number is taken.
        """
        if key in self._ended or key in self._running:
            raise InvalidRequest(f"pull {key[1]} was ended before it began, or its number is taken")
        task = asyncio.current_task()
        assert task is not None
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if key[1]:
            self._running[key] = task, over
        try:
            yield
        finally:
            self._running.pop(key, None)
            over.set_result(None)

    async def end(self, keys: Iterable[PullKey]) -> None:
        """On return these are over, and will not begin."""
        waiting = []
        for key in keys:
            self._ended[key] = None
            if key in self._running:
                task, over = self._running[key]
                task.cancel()
                waiting.append(over)
        while len(self._ended) > _REMEMBERED:
            del self._ended[next(iter(self._ended))]
        if waiting:
            await asyncio.wait(waiting)
