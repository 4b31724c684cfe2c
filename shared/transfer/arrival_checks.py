"""Checksums of blocks as they arrive, while others are coming.

A block in host memory is checked by the thread that brought it: its bytes are in that core's cache, and to read them
there takes half of what it takes another core. Where a core has nothing else to do a thread beside takes what it can
all the same, and checks cost a third: with more cores than transfers keep busy, which through shared memory are those
of the receiver's lanes alone. Over TCP on two cores that would make transfers 5 % slower. Blocks in device memory are
checked by the device, all at once when they have arrived.
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future

from shared.device_arena import DeviceBlock
from shared.settle import settle
from shared.transfer.checksum import Block, block_checksum, checksums_of

HANDED_OVER_BYTES = 1 << 20
"""Smaller blocks are sooner checked than handed to another thread."""
_MAX_HANDED_OVER = 2
_NO_MORE = -1
_LINGER_S = 0.002
"""So long the thread beside waits for the next block: to wake it from there costs less than to call it anew."""


class ArrivalChecks:
    """The checksums of one transfer.

    Args:
        blocks: All in one kind of memory, in the order in which `arrived` will name them.
        executor: The threads beside.
        hands_over: Whether they take what they can of large blocks, while others are brought; asked for each, by the
            thread that brought it.

    Attributes:
        seconds: Spent on checksums so far, by whomever.
    """

    def __init__(self, blocks: Sequence[Block], executor: Executor, *, hands_over: Callable[[], bool]) -> None:
        self._blocks = blocks
        self._executor = executor
        self._hands_over = hands_over
        self._are_large = blocks[0].nbytes >= HANDED_OVER_BYTES
        self._is_on_device = isinstance(blocks[0], DeviceBlock)
        self._checksums: list[int | None] = [None] * len(blocks)
        self._handed_over: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._beside: Future[None] | None = None
        self.seconds = 0.0

    def arrived(self, index: int) -> None:
        """Block `index` is in memory, as all before it are; to be called for each, by the thread that brought it."""
        if self._is_on_device:
            return
        is_last = index == len(self._blocks) - 1  # nothing else is to be done meanwhile
        if is_last:
            self._handed_over.put(_NO_MORE)  # the thread beside is through before anybody waits for it
        is_full = is_last or not self._are_large or self._handed_over.qsize() >= _MAX_HANDED_OVER
        if is_full or not self._hands_over():
            self._check(index)
            return
        self._handed_over.put(index)
        if self._beside is None or self._beside.done():
            self._beside = self._executor.submit(self._check_handed_over)

    async def finish(self) -> list[int]:
        """The checksum of each block; to be called when all have arrived. Nothing reads them afterwards."""
        if self._beside is not None and self._beside.done():
            self._beside.result()
        else:
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
        self._handed_over.put(_NO_MORE)
        if self._beside is not None and not self._beside.cancel():
            await asyncio.wrap_future(self._beside)

    def _check_handed_over(self) -> None:
        """Beside: until no more come soon."""
        try:
            while (index := self._handed_over.get(timeout=_LINGER_S)) != _NO_MORE:
                self._check(index)
        except queue.Empty:
            pass

    def _check(self, index: int) -> None:
        started_s = time.monotonic()
        self._checksums[index] = block_checksum(self._blocks[index])
        self.seconds += time.monotonic() - started_s
