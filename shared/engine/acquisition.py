"""How a sequence in WAITING_FOR_KV gets sealed blocks from elsewhere: slots, bytes, commit.

    attach_cached -> blocks that are here already
    reserve       -> private slots for a fetch
    commit        -> their bytes are verified: sealed and, where they continue the sequence, in its table
    discard       -> the fetch is over and brought nothing
    quarantine    -> the fetch is not provably over: the slots are out of use until `release_quarantined`

Slots belong to the fetch and not to the sequence: if that ends meanwhile they stay until one of the last three. A
sequence that only waits may lose its table to one that needs the room; `commit` then leaves blocks to the cache, and
the sequence finds them there by hash when it starts.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from shared.engine.block_pool import BlockPool
from shared.engine.scheduler import Scheduler
from shared.engine.sequence import Sequence
from shared.identity import BlockHash, BlockId


class KvAcquisition:
    """Brings KV to sequences that do not run. Guarded by the engine's lock; safe beside a step in flight.

    Attributes:
        reserved: Slots of open fetches.
    """

    def __init__(self, pool: BlockPool, scheduler: Scheduler) -> None:
        self._pool = pool
        self._scheduler = scheduler
        self._tables = scheduler.tables
        self.reserved: set[BlockId] = set()

    def attach_cached(self, sequence: Sequence) -> int:
        """Extends the table by cached blocks; returns how many blocks the sequence holds now."""
        if self._scheduler.is_acquiring(sequence):
            self._tables.attach(sequence, self._tables.match(sequence))
        return len(sequence.block_table)

    def reserve(self, sequence: Sequence, n: int) -> list[BlockId]:
        """Exactly `n` destination slots, or none if there is no room that running sequences can spare."""
        if not self._scheduler.is_acquiring(sequence) or not self._scheduler.preemption.make_spare(n, sequence):
            return []
        slots = self._pool.allocate(n)
        assert slots is not None, "spare blocks could not be allocated"
        self.reserved.update(slots)
        return slots

    def commit(self, sequence: Sequence, slots: Seq[BlockId], names: Seq[BlockHash]) -> None:
        """Seals slots whose verified bytes arrived; a name that became cached meanwhile frees its slot."""
        limit = self._tables.reusable_blocks(sequence)
        for slot, name in zip(slots, names, strict=True):
            self.reserved.remove(slot)
            block = self._pool.seal(slot, name)
            held = len(sequence.block_table)
            if self._scheduler.is_acquiring(sequence) and held < limit and sequence.block_hashes[held] == name:
                self._tables.adopt(sequence, block)
            else:
                self._pool.unref(block)

    def discard(self, slots: Seq[BlockId]) -> None:
        """Frees slots that no transport writes any more."""
        for slot in slots:
            self.reserved.remove(slot)
            self._pool.unref(slot)

    def quarantine(self, slots: Seq[BlockId]) -> None:
        """Sets slots aside that a transport may still write."""
        for slot in slots:
            self.reserved.remove(slot)
            self._pool.quarantine(slot)

    def release_quarantined(self, slots: Seq[BlockId]) -> None:
        """Frees quarantined slots."""
        for slot in slots:
            self._pool.release_quarantined(slot)
