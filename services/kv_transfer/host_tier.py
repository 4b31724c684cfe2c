"""The host tier: sealed blocks that the worker is about to evict, kept in this process's memory.

One more holder of blocks: it serves the own worker and peers alike. `two_queue` says which block goes first; one that
is being read is pinned and stays. Checksums are taken from what was read out of the arena and checked on every way out.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import structlog

from services.kv_transfer.block_copy import copy_and_checksum
from services.kv_transfer.two_queue import TwoQueue
from shared.identity import BlockHash, Fingerprint
from shared.transfer.checksum import Block, HostBlock

log = structlog.get_logger(__name__)


class _Slab:
    """Memory for blocks of one size; pages are taken from the system when first written."""

    def __init__(self, num_slots: int, block_bytes: int) -> None:
        self.blocks = np.empty((num_slots, block_bytes), dtype=np.uint8)
        self.free = list(range(num_slots))


@dataclass(eq=False, slots=True)
class TierBlock:
    """A block in the tier.

    Attributes:
        checksum: Of its bytes as they were in the arena.
        pins: Readers; while there are any, the bytes stay.
        is_dropped: Out of the index; its slot is free as soon as the last reader leaves.
    """

    block_hash: BlockHash
    slab: _Slab
    slot: int
    checksum: int
    pins: int = 0
    is_dropped: bool = False

    @property
    def block(self) -> HostBlock:
        """Its bytes; valid while pinned."""
        view: HostBlock = self.slab.blocks[self.slot]
        return view


class HostTier:
    """Owned by the event loop; only the copying happens elsewhere.

    Args:
        budget_bytes: Upper bound of block memory; 0 = keep nothing.
        executor: For copies and checksums.
        on_change: Told (added, dropped) hashes.
    """

    def __init__(
        self,
        budget_bytes: int,
        executor: Executor,
        on_change: Callable[[Sequence[BlockHash], Sequence[BlockHash]], None],
    ) -> None:
        self.budget_bytes = budget_bytes
        self._executor = executor
        self._on_change = on_change
        self._index: dict[BlockHash, TierBlock] = {}
        self._order: TwoQueue[BlockHash] = TwoQueue(0)
        self._filling: set[BlockHash] = set()
        self._slab = _Slab(0, 1)
        self._kind: tuple[Fingerprint, int] | None = None
        self.hits = 0
        self.corrupt = 0

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, block_hash: object) -> bool:
        return block_hash in self._index

    @property
    def capacity(self) -> int:
        """Blocks that the budget has room for."""
        return len(self._slab.blocks)

    @property
    def used_bytes(self) -> int:
        """Held by blocks in the index."""
        return len(self._index) * self._slab.blocks.shape[1]

    def hashes(self) -> list[BlockHash]:
        """Everything held, roughly the next to go first."""
        return list(self._order)

    def adopt(self, fingerprint: Fingerprint, block_bytes: int) -> None:
        """Prepares for the blocks of a worker; blocks of another model or size are dropped."""
        if self._kind == (fingerprint, block_bytes):
            return
        self._drop(list(self._index.values()))
        self._kind = (fingerprint, block_bytes)
        self._slab = _Slab(self.budget_bytes // block_bytes, block_bytes)
        self._order = TwoQueue(self.capacity)

    async def save(
        self,
        hashes: Sequence[BlockHash],
        blocks: Sequence[Block],
        is_unchanged: Callable[[BlockHash], bool] = lambda block_hash: True,
    ) -> list[bool]:
        """Copies blocks in.

        Args:
            hashes: Of the blocks.
            blocks: Their bytes.
            is_unchanged: Asked after the copy: whether what was copied is the block.

        Returns:
            Per block whether the tier has it now.
        """
        given = dict(zip(hashes, blocks, strict=True))

        async def copy(names: Sequence[BlockHash], targets: Sequence[Block]) -> Sequence[int | None]:
            sources = [given[name] for name in names]
            checksums = await copy_and_checksum(self._executor, sources, targets, checksum_source=True)
            return [checksum if is_unchanged(name) else None for name, checksum in zip(names, checksums, strict=True)]

        await self.fill(hashes, copy)
        return [block_hash in self._index for block_hash in hashes]

    async def fill(
        self,
        hashes: Sequence[BlockHash],
        load: Callable[[Sequence[BlockHash], Sequence[Block]], Awaitable[Sequence[int | None]]],
    ) -> None:
        """Takes in blocks that are not here yet, as far as there is room; those that are here count as used.

        Args:
            hashes: Of the blocks.
            load: Fills memory with the blocks named and returns their checksums, None for one that cannot be had. When
                it has ended, in whatever way, nothing writes to that memory any more.
        """
        fresh: list[tuple[BlockHash, int]] = []
        slab = self._slab
        for block_hash in hashes:
            if block_hash in self._index:
                self._order.touch(block_hash)
            elif block_hash not in self._filling and (slot := self._take_slot()) is not None:
                self._filling.add(block_hash)
                fresh.append((block_hash, slot))
        if not fresh:
            return
        checksums: Sequence[int | None] = [None] * len(fresh)
        try:
            checksums = await load([block_hash for block_hash, _ in fresh], [slab.blocks[slot] for _, slot in fresh])
        finally:
            self._filling.difference_update(block_hash for block_hash, _ in fresh)
            taken = [self._take_in(slab, *block, checksum) for block, checksum in zip(fresh, checksums, strict=True)]
        self._on_change([block_hash for (block_hash, _), is_in in zip(fresh, taken, strict=True) if is_in], [])

    def _take_in(self, slab: _Slab, block_hash: BlockHash, slot: int, checksum: int | None) -> bool:
        if checksum is None or slab is not self._slab:
            slab.free.append(slot)
            return False
        self._index[block_hash] = TierBlock(block_hash, slab, slot, checksum)
        self._order.add(block_hash)
        return True

    def hold(self, block_hash: BlockHash) -> TierBlock | None:
        """Pins one block for housekeeping: that does not count as a use."""
        entry = self._index.get(block_hash)
        if entry is not None:
            entry.pins += 1
        return entry

    def pin(self, hashes: Iterable[BlockHash]) -> list[TierBlock | None]:
        """Finds blocks and keeps them in place until `unpin`; None for each that is not here."""
        found = [self._index.get(block_hash) for block_hash in hashes]
        for entry in reversed(found):  # a prompt's first blocks are worth the most: they become the most recent
            if entry is not None:
                entry.pins += 1
                self.hits += 1
                self._order.touch(entry.block_hash)
        return found

    def unpin(self, blocks: Iterable[TierBlock | None]) -> None:
        """Lets go of blocks that `pin` returned, each once."""
        for entry in blocks:
            if entry is None:
                continue
            assert entry.pins > 0
            entry.pins -= 1
            if entry.is_dropped and not entry.pins:
                entry.slab.free.append(entry.slot)

    def discard_corrupt(self, block_hash: BlockHash) -> None:
        """Drops a block whose bytes do not match its checksum any more."""
        entry = self._index.get(block_hash)
        if entry is not None:
            self.corrupt += 1
            log.error("tier_block_corrupt", block_hash=block_hash.hex())
            self._drop([entry])

    def _take_slot(self) -> int | None:
        if not self._slab.free:
            victim = self._order.evict(lambda block_hash: not self._index[block_hash].pins)
            if victim is None:
                return None
            self._let_go([self._index[victim]])
        return self._slab.free.pop()

    def _drop(self, entries: Sequence[TierBlock]) -> None:
        for entry in entries:
            self._order.remove(entry.block_hash)
        self._let_go(entries)

    def _let_go(self, entries: Sequence[TierBlock]) -> None:
        for entry in entries:
            del self._index[entry.block_hash]
            entry.is_dropped = True
            if not entry.pins:
                entry.slab.free.append(entry.slot)
        if entries:
            self._on_change([], [entry.block_hash for entry in entries])
