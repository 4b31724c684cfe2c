"""What a worker that is gone left in shared memory, served until its successor takes it over."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from services.kv_transfer.attachment import Attachment, WorkerPin, slot_sources
from shared.errors import Unavailable
from shared.identity import BlockHash
from shared.kv_arena import SharedArena
from shared.seal_table import SealedSlot, SealTable

QUIET_S = 5.0
"""Transfers that are told to break off do so within milliseconds."""
_POLL_S = 0.005


class Orphan:
    """An arena that nobody changes any more. Owned by the event loop.

    Args:
        attachment: Of the worker that is gone; its pulls may still be ending.
        table: What its slots hold.
    """

    def __init__(self, attachment: Attachment, table: SealTable) -> None:
        self.arena: SharedArena = attachment.shared_arena
        self.table = table
        self._destinations = attachment.destinations
        self._slots: dict[BlockHash, SealedSlot] = {slot.name: slot for slot in table.sealed()}
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._readers = 0

    def hashes(self) -> list[BlockHash]:
        """Every sealed block."""
        return list(self._slots)

    @contextlib.asynccontextmanager
    async def pin(self, hashes: Sequence[BlockHash]) -> AsyncIterator[WorkerPin]:
        """Keeps the arena as it is as long as the context is open, or until `lost` is done."""
        slots = [self._slots.get(block_hash) for block_hash in hashes]
        self._readers += 1
        try:
            yield WorkerPin(slot_sources(self.arena, self.table, slots), self._ended)
        finally:
            self._readers -= 1

    async def end(self) -> None:
        """Breaks everything off. On return no transfer reads or writes the arena.

        Raises:
            Unavailable: A transfer does not end.
        """
        if not self._ended.done():
            self._ended.set_result(None)
        try:
            async with asyncio.timeout(QUIET_S):
                while self._readers or self._destinations:  # noqa: ASYNC110 - seldom, and soon over
                    await asyncio.sleep(_POLL_S)
        except TimeoutError as exc:
            raise Unavailable(f"transfers of the worker before do not end within {QUIET_S:g} s") from exc

    def unlink(self) -> None:
        """Removes the files: no successor will come while this process lives."""
        self.arena.unlink()
        self.table.unlink()
