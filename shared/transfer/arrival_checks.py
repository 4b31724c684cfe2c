"""Checksums of blocks as they arrive, while others are coming.

A block in host memory is checked by the thread that brought it: its bytes are in that core's cache, and to read them
there takes half of what it takes another core, which as a rule has something else to do. One in device memory has to be
copied to the host for it: a worker thread does that, told of it without passing through the event loop, and what it has
not been told of is done at the end.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future

from shared.device_arena import DeviceBlock
from shared.transfer.checksum import Block, block_checksum, checksums_of
from shared.transfer.settle import settle

_PIECE_BYTES = 4 << 20  # waking a thread for less costs more than the checksums


class ArrivalChecks:
    """The checksums of one transfer.

    Args:
        blocks: All of one size and in one kind of memory, in the order in which `arrived` will name them.
        executor: For what the transport's thread does not do.

    Attributes:
        seconds: Spent on checksums so far.
    """

    def __init__(self, blocks: Sequence[Block], executor: Executor) -> None:
        self._blocks = blocks
        self._executor = executor
        self._is_on_device = isinstance(blocks[0], DeviceBlock)
        self._piece = max(1, _PIECE_BYTES // blocks[0].nbytes)
        self._lock = threading.Lock()
        self._num_arrived = 0
        self._is_following = False
        self._following: Future[None] | None = None
        self._checksums: list[int] = []
        self.seconds = 0.0

    def arrived(self, index: int) -> None:
        """Block `index` is in memory, as all before it are; to be called for each, by the thread that brought it."""
        if not self._is_on_device:
            started_s = time.monotonic()
            self._checksums.append(block_checksum(self._blocks[index]))
            self.seconds += time.monotonic() - started_s
            return
        with self._lock:
            self._num_arrived = index + 1
            if self._is_following or self._num_arrived - len(self._checksums) < self._piece:
                return
            self._is_following = True
            try:
                self._following = self._executor.submit(self._follow)
            except RuntimeError:
                self._is_following = False  # this process is ending, and with it the transfer

    async def finish(self) -> list[int]:
        """The checksum of each block; to be called when all have arrived."""
        await self.settled()
        if self._following is not None:
            self._following.result()
        rest = self._blocks[len(self._checksums) :]
        started_s = time.monotonic()
        self._checksums += await settle(checksums_of(rest, self._executor))
        self.seconds += time.monotonic() - started_s
        return self._checksums

    async def settled(self) -> None:
        """On return, and if cancelled, nothing reads the blocks any more, provided that none arrives."""
        if self._following is not None:
            following = asyncio.wrap_future(self._following)
            await settle(asyncio.wait([following]))
            following.exception()  # `finish` raises it

    def _follow(self) -> None:
        while True:
            with self._lock:
                start, end = len(self._checksums), self._num_arrived
                if start == end:
                    self._is_following = False
                    return
            started_s = time.monotonic()
            self._checksums += [block_checksum(block) for block in self._blocks[start:end]]
            self.seconds += time.monotonic() - started_s
