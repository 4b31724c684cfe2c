"""What the KV directory is told about this process's blocks: those in the worker's arena and those in the tier."""

from __future__ import annotations

from collections.abc import Sequence

from shared.directory.holder import Holder
from shared.identity import BlockHash


class BlockHints:
    """The union of arena and tier, announced by difference. Owned by the event loop.

    Attributes:
        holder: Where changes are published; None until the directory is there.
        stale_blocks: That peers came for and that were not here, so far.
    """

    def __init__(self) -> None:
        self.holder: Holder | None = None
        self.stale_blocks = 0
        self._arena: set[BlockHash] = set()
        self._tier: set[BlockHash] = set()

    def held(self) -> set[BlockHash]:
        """Every block that a peer may ask for."""
        return self._arena | self._tier

    def arena_changed(self, sealed: Sequence[BlockHash], evicted: Sequence[BlockHash]) -> None:
        """The worker sealed and evicted blocks."""
        self._arena.difference_update(evicted)
        self._arena.update(sealed)
        self._publish(sealed, [block_hash for block_hash in evicted if not self._has(block_hash)])

    def arena_replaced(self, sealed: Sequence[BlockHash]) -> None:
        """The worker starts over with `sealed`; nothing, when it is gone."""
        gone = self._arena - set(sealed)
        self._arena = set(sealed)
        self._publish(sealed, [block_hash for block_hash in gone if block_hash not in self._tier])

    def tier_changed(self, added: Sequence[BlockHash], dropped: Sequence[BlockHash]) -> None:
        """The tier took blocks in or let them go."""
        self._tier.difference_update(dropped)
        self._tier.update(added)
        self._publish(added, [block_hash for block_hash in dropped if block_hash not in self._arena])

    def deny(self, missing: Sequence[BlockHash]) -> None:
        """A peer came for blocks that are not here: it must have read a stale hint."""
        self.stale_blocks += len(missing)
        self._arena.difference_update(missing)
        self._publish([], [block_hash for block_hash in missing if block_hash not in self._tier])

    def _has(self, block_hash: BlockHash) -> bool:
        return block_hash in self._arena or block_hash in self._tier

    def _publish(self, sealed: Sequence[BlockHash], evicted: Sequence[BlockHash]) -> None:
        if self.holder is not None and (sealed or evicted):
            self.holder.publish(sealed, evicted)
