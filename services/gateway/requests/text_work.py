"""Tokenizing and rendering of long prompts, beside the event loop.

Short ones are done in place: a thread costs more than they do. The tokenizer releases the GIL; the template holds it,
but in a thread it gives way every few milliseconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

INLINE_CHARS = 4_000  # about a millisecond of tokenizing


class TextWork:
    """A few threads for text; owned by the gateway, closed with it."""

    def __init__(self, num_threads: int = 2) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="text")

    async def run(self, work: Callable[[], T], *, is_short: bool) -> T:
        """Returns `work()`, done in place if it is short, else in a thread."""
        if is_short:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Lets running work end and takes no more."""
        self._threads.shutdown(wait=False, cancel_futures=True)
