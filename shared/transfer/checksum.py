"""Checksums of block bytes: xxh3-64, tens of GB/s, so that they can always be on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

Block = npt.NDArray[np.uint8]
"""The bytes of one KV block: uint8 `[block_bytes]`, contiguous."""

CHECKSUM_BYTES = 8


def block_checksum(block: Block) -> int:
    """xxh3-64 of a block; releases the GIL while it reads."""
    return xxhash.xxh3_64_intdigest(block.data)


def block_checksums(blocks: Sequence[Block]) -> list[int]:
    """The checksum of each block. Blocks the calling thread: megabytes belong in a worker thread."""
    return [block_checksum(block) for block in blocks]
