"""Checksums for what the worker sealed, computed beside it while it works.

A block's bytes are read once in its life here instead of before each time it is sent; and when the worker dies, its
successor takes over what still matches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor

from shared.kv_arena import SharedArena
from shared.seal_table import SealedSlot, SealTable
from shared.settle import settle
from shared.transfer.checksum import block_checksum

_PIECE_BYTES = 16 << 20
_PAUSE_S = 0.02


async def keep_checking(table: SealTable, arena: SharedArena, executor: Executor, changed: asyncio.Event) -> None:
    """Adds checksums to what is sealed, until cancelled.

    Args:
        table: The worker's.
        arena: Likewise.
        executor: Where the bytes are read, a piece at a time.
        changed: Set when the worker sealed something.
    """
    while True:
        await changed.wait()
        changed.clear()
        await check_all(table, arena, executor)
        await asyncio.sleep(_PAUSE_S)


async def check_all(table: SealTable, arena: SharedArena, executor: Executor) -> None:
    """Adds checksums to everything that is sealed now and has none."""
    unchecked = table.unchecked()
    for piece in _pieces(unchecked, arena):
        await settle(asyncio.get_running_loop().run_in_executor(executor, _check, table, arena, piece))


async def matching(table: SealTable, arena: SharedArena, executor: Executor) -> list[SealedSlot]:
    """Sealed blocks whose bytes are what they were when they got their checksum, in the order of sealing."""
    good: list[SealedSlot] = []
    for piece in _pieces([slot for slot in table.sealed() if slot.checksum is not None], arena):
        good += await settle(asyncio.get_running_loop().run_in_executor(executor, _matching, arena, piece))
    return good


def _pieces(slots: Sequence[SealedSlot], arena: SharedArena) -> list[Sequence[SealedSlot]]:
    step = max(1, _PIECE_BYTES // arena.block_bytes)
    return [slots[start : start + step] for start in range(0, len(slots), step)]


def _check(table: SealTable, arena: SharedArena, slots: Sequence[SealedSlot]) -> None:
    for slot in slots:
        table.note_checksum(slot, block_checksum(arena.blocks[slot.block_id]))


def _matching(arena: SharedArena, slots: Sequence[SealedSlot]) -> list[SealedSlot]:
    return [slot for slot in slots if block_checksum(arena.blocks[slot.block_id]) == slot.checksum]
