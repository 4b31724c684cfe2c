"""Checksums of block bytes: xxh3-64, tens of GB/s, so that they can always be on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np
import numpy.typing as npt
import xxhash

from shared.device_arena import DeviceBlock

HostBlock = npt.NDArray[np.uint8]
"""The bytes of one KV block in host memory: uint8 `[block_bytes]`, contiguous."""

Block = HostBlock | DeviceBlock
"""The bytes of one KV block, wherever they are."""

CHECKSUM_BYTES = 8

_AT_ONCE_BYTES = 1 << 20


def block_checksum(block: Block) -> int:
    """xxh3-64 of a block; releases the GIL while it reads. For one in device memory the device does it."""
    if isinstance(block, DeviceBlock):
        return block.arena.checksums([block])[0]
    return xxhash.xxh3_64_intdigest(block.data)


def is_contiguous(block: Block) -> bool:
    """Its bytes follow each other."""
    return isinstance(block, DeviceBlock) or block.flags.c_contiguous


def copy_block(source: Block, target: Block) -> None:
    """Copies a block; of the two at most one is in device memory. Blocks until the bytes are there."""
    if isinstance(target, DeviceBlock):
        assert not isinstance(source, DeviceBlock), "blocks on a device are copied by the transport"
        target.write_from(source)
    elif isinstance(source, DeviceBlock):
        source.read_into(target)
    else:
        np.copyto(target, source)


def block_checksums(blocks: Sequence[Block]) -> list[int]:
    """The checksum of each block; those in device memory, all of one arena, in one go.

    Blocks the calling thread: megabytes belong in a worker thread.
    """
    on_device = [block for block in blocks if isinstance(block, DeviceBlock)]
    found = iter(on_device[0].arena.checksums(on_device) if on_device else ())
    return [next(found) if isinstance(block, DeviceBlock) else block_checksum(block) for block in blocks]


def checksums_of(blocks: Sequence[Block], executor: Executor) -> asyncio.Future[list[int]]:
    """Starts on the checksum of each block, on the event loop; what is sooner done than handed over is done at once."""
    loop = asyncio.get_running_loop()
    if _is_soon_done(blocks):
        done: asyncio.Future[list[int]] = loop.create_future()
        done.set_result(block_checksums(blocks))
        return done
    return loop.run_in_executor(executor, block_checksums, blocks)


def _is_soon_done(blocks: Sequence[Block]) -> bool:
    return sum(block.nbytes for block in blocks) <= _AT_ONCE_BYTES and not any(
        isinstance(block, DeviceBlock) for block in blocks
    )
