"""Checksums of blocks as they arrive, while others are coming.

A block in host memory is checked by the thread that brought it: its bytes are in that core's cache, and to read them
there takes half of what it takes another core, which as a rule has something else to do. Those in device memory are
checked by the device, all at once when they have arrived.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Executor

from shared.device_arena import DeviceBlock
from shared.transfer.checksum import Block, block_checksum, checksums_of
from shared.transfer.settle import settle


class ArrivalChecks:
    """The checksums of one transfer.

    Args:
        blocks: All in one kind of memory, in the order in which `arrived` will name them.
        executor: For what the transport's thread does not do.

    Attributes:
        seconds: Spent on checksums so far.
    """

    def __init__(self, blocks: Sequence[Block], executor: Executor) -> None:
        self._blocks = blocks
        self._executor = executor
        self._is_on_device = isinstance(blocks[0], DeviceBlock)
        self._checksums: list[int] = []
        self.seconds = 0.0

    def arrived(self, index: int) -> None:
        """Block `index` is in memory, as all before it are; to be called for each, by the thread that brought it."""
        if self._is_on_device:
            return
        started_s = time.monotonic()
        self._checksums.append(block_checksum(self._blocks[index]))
        self.seconds += time.monotonic() - started_s

    async def finish(self) -> list[int]:
        """The checksum of each block; to be called when all have arrived. Nothing reads them afterwards."""
        rest = self._blocks[len(self._checksums) :]
        started_s = time.monotonic()
        self._checksums += await settle(checksums_of(rest, self._executor))
        self.seconds += time.monotonic() - started_s
        return self._checksums
