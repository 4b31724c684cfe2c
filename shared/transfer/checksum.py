"""Checksums of block bytes: xxh3-64, tens of GB/s, so that they can always be on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np
import numpy.typing as npt
import xxhash

Block = npt.NDArray[np.uint8]
"""The bytes of one KV block: uint8 `[block_bytes]`, contiguous."""

CHECKSUM_BYTES = 8

_AT_ONCE_BYTES = 1 << 20


def block_checksum(block: Block) -> int:
    """xxh3-64 of a block; releases the GIL while it reads."""
    return xxhash.xxh3_64_intdigest(block.data)


def block_checksums(blocks: Sequence[Block]) -> list[int]:
    """The checksum of each block. Blocks the calling thread: megabytes belong in a worker thread."""
    return [block_checksum(block) for block in blocks]


def checksums_of(blocks: Sequence[Block], executor: Executor) -> asyncio.Future[list[int]]:
    """Starts on the checksum of each block, on the event loop; what is sooner done than handed over is done at once."""
    loop = asyncio.get_running_loop()
    if sum(block.nbytes for block in blocks) > _AT_ONCE_BYTES:
        return loop.run_in_executor(executor, block_checksums, blocks)
    done: asyncio.Future[list[int]] = loop.create_future()
    done.set_result(block_checksums(blocks))
    return done
