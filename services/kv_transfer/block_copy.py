"""Copies of blocks between the arena and the host tier, in worker threads and in bounded pieces.

numpy's copy and xxhash release the GIL, so the event loop turns meanwhile. A piece that has begun is finished before
anything is reported, also when its caller was cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor

from shared.device_arena import DeviceBlock
from shared.settle import settle
from shared.transfer.checksum import Block, block_checksum, block_checksums, copy_block

PIECE_BYTES = 16 << 20


async def copy_and_checksum(
    executor: Executor, sources: Sequence[Block], targets: Sequence[Block], *, checksum_source: bool
) -> list[int]:
    """Copies each source to its target and returns checksums: of what was read, or of what was written.

    On return, and also when cancelled, no thread touches the blocks any more.
    """
    if not sources:
        return []
    loop = asyncio.get_running_loop()
    step = max(1, PIECE_BYTES // sources[0].nbytes)
    checksums: list[int] = []
    for start in range(0, len(sources), step):
        piece = slice(start, start + step)
        work = loop.run_in_executor(executor, _copy, sources[piece], targets[piece], checksum_source)
        checksums.extend(await settle(work))
    return checksums


def _copy(sources: Sequence[Block], targets: Sequence[Block], checksum_source: bool) -> list[int]:
    checked = sources if checksum_source else targets
    checksums = []
    for source, target, block in zip(sources, targets, checked, strict=True):
        copy_block(source, target)
        if not isinstance(block, DeviceBlock):
            checksums.append(block_checksum(block))  # in the cache still
    return checksums or block_checksums(checked)
