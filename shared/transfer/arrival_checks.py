"""Checksums of blocks as they arrive, while others are coming.

Whoever brings a block into host memory also checks it, unless a thread beside has nothing to do: that takes it then,
and the next one is brought meanwhile. The bringer finds the bytes in its core's cache, in half the time that another
core takes; but where a core is free, its time costs nobody anything, and of a transfer through shared memory, which is
one thread's copy, the checks then cost half. Blocks in device memory are checked by the device, all at once when they
have arrived.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future

from shared.device_arena import DeviceBlock
from shared.transfer.checksum import Block, block_checksum, checksums_of
from shared.transfer.settle import settle

HANDED_OVER_BYTES = 1 << 20
"""Smaller blocks are sooner checked than handed to another thread."""


class ArrivalChecks:
    """The checksums of one transfer.

    Args:
        blocks: All in one kind of memory, in the order in which `arrived` will name them.
        executor: The threads beside.

    Attributes:
        seconds: Spent on checksums so far, by whomever.
    """

    def __init__(self, blocks: Sequence[Block], executor: Executor) -> None:
        self._blocks = blocks
        self._executor = executor
        self._is_on_device = isinstance(blocks[0], DeviceBlock)
        self._checksums: list[int | None] = [None] * len(blocks)
        self._beside: Future[None] | None = None  # the last check that was handed over; all before it have ended
        self.seconds = 0.0

    def arrived(self, index: int) -> None:
        """Block `index` is in memory, as all before it are; to be called for each, by the thread that brought it."""
        if self._is_on_device:
            return
        is_last = index == len(self._blocks) - 1  # nothing else is to be done meanwhile
        if is_last or self._blocks[index].nbytes < HANDED_OVER_BYTES or self._is_busy_beside:
            self._check(index)
        else:
            self._beside = self._executor.submit(self._check, index)

    async def finish(self) -> list[int]:
        """The checksum of each block; to be called when all have arrived. Nothing reads them afterwards."""
        await settle(self.stop())
        rest = [index for index, checksum in enumerate(self._checksums) if checksum is None]
        started_s = time.monotonic()
        found = await settle(checksums_of([self._blocks[index] for index in rest], self._executor))
        self.seconds += time.monotonic() - started_s
        for index, checksum in zip(rest, found, strict=True):
            self._checksums[index] = checksum
        return [checksum for checksum in self._checksums if checksum is not None]

    async def stop(self) -> None:
        """On return nothing reads the blocks. No more may arrive.

        Raises:
            Exception: A checksum could not be taken.
        """
        if self._beside is not None and not self._beside.cancel():
            await asyncio.wrap_future(self._beside)

    @property
    def _is_busy_beside(self) -> bool:
        return self._beside is not None and not self._beside.done()

    def _check(self, index: int) -> None:
        started_s = time.monotonic()
        self._checksums[index] = block_checksum(self._blocks[index])
        self.seconds += time.monotonic() - started_s
