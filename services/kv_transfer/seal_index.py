"""Finds the worker's blocks by name in the table that it keeps, without asking it."""

from __future__ import annotations

from collections.abc import Sequence

from shared.identity import BlockHash
from shared.seal_table import SealedSlot, SealTable


class SealIndex:
    """Follows a table that another process changes; every answer was true at the moment it was given."""

    def __init__(self, table: SealTable) -> None:
        self._table = table
        self._slots: dict[BlockHash, SealedSlot] = {}
        self._seen_stamp = 0

    def find(self, hashes: Sequence[BlockHash]) -> list[SealedSlot | None]:
        """Where the named blocks are now, None for each that is not sealed."""
        found = [self._look_up(block_hash) for block_hash in hashes]
        if None in found and self._catch_up():
            found = [slot or self._look_up(block_hash) for slot, block_hash in zip(found, hashes, strict=True)]
        return found

    def _look_up(self, block_hash: BlockHash) -> SealedSlot | None:
        known = self._slots.get(block_hash)
        if known is None or (known.checksum is not None and self._table.holds(known)):
            return known
        slot = self._table.slot(known.block_id)
        if slot is None or slot.name != block_hash:
            del self._slots[block_hash]
            return None
        self._slots[block_hash] = slot
        return slot

    def _catch_up(self) -> bool:
        news = self._table.sealed(after=self._seen_stamp)
        for slot in news:
            self._slots[slot.name] = slot
        if news:
            self._seen_stamp = news[-1].stamp
        if len(self._slots) > 2 * self._table.num_blocks:  # names of blocks that are gone
            self._slots = {slot.name: slot for slot in self._table.sealed()}
        return bool(news)
