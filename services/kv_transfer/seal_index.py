"""Finds the worker's blocks by name in the table that it keeps, without asking it."""

from __future__ import annotations

from collections.abc import Sequence

from shared.identity import BlockHash, BlockId
from shared.seal_table import SealedSlot, SealTable


class SealIndex:
    """Follows a table that another process changes; every answer was true at the moment it was given."""

    def __init__(self, table: SealTable) -> None:
        self._table = table
        self._block_ids: dict[BlockHash, BlockId] = {}
        self._seen_stamp = 0

    def find(self, hashes: Sequence[BlockHash]) -> list[SealedSlot | None]:
        """Where the named blocks are now, None for each that is not sealed."""
        found = [self._look_up(block_hash) for block_hash in hashes]
        if None in found and self._catch_up():
            found = [slot or self._look_up(block_hash) for slot, block_hash in zip(found, hashes, strict=True)]
        return found

    def _look_up(self, block_hash: BlockHash) -> SealedSlot | None:
        block_id = self._block_ids.get(block_hash)
        if block_id is None:
            return None
        slot = self._table.slot(block_id)
        if slot is None or slot.name != block_hash:
            del self._block_ids[block_hash]
            return None
        return slot

    def _catch_up(self) -> bool:
        news = self._table.sealed(after=self._seen_stamp)
        for slot in news:
            self._block_ids[slot.name] = slot.block_id
        if news:
            self._seen_stamp = news[-1].stamp
        if len(self._block_ids) > 2 * self._table.num_blocks:  # names of blocks that are gone
            self._block_ids = {slot.name: slot.block_id for slot in self._table.sealed()}
        return bool(news)
