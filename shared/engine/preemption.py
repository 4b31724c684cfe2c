"""Who yields when memory runs out: what does not run leaves cached blocks first, then running sequences are preempted.

Both find most of their blocks again by hash.
"""

from __future__ import annotations

from collections.abc import Iterator

from shared.engine.block_pool import BlockPool
from shared.engine.block_tables import BlockTables
from shared.engine.policy import preemption_cost
from shared.engine.sequence import Sequence, SequenceStatus
from shared.engine.siblings import Siblings
from shared.engine.step_budget import GROWTH_BLOCKS
from shared.engine.waiting_queue import WaitingQueue
from shared.identity import SequenceId


class Preemption:
    """Makes room in the pool at the cost of the scheduler's groups, which it shares with the scheduler.

    Args:
        pool: Where blocks are short.
        tables: Of all sequences.
        acquiring, waiting, running: The groups; preempted sequences move from the last to the second.
        siblings: Says who cannot start yet in any case.

    Attributes:
        count: Times that a running sequence had to yield.
    """

    def __init__(
        self,
        pool: BlockPool,
        tables: BlockTables,
        *,
        acquiring: dict[SequenceId, Sequence],
        waiting: WaitingQueue,
        running: list[Sequence],
        siblings: Siblings,
    ) -> None:
        self._pool = pool
        self._tables = tables
        self._acquiring = acquiring
        self._waiting = waiting
        self._running = running
        self._siblings = siblings
        self.count = 0

    def num_spare_blocks(self) -> int:
        """Blocks that nobody running will want soon; may be negative.

        That is what is left when each begun prompt is complete and each sequence that decodes has grown a little.
        """
        num_missing_blocks = self._tables.num_missing_blocks
        promised = sum(GROWTH_BLOCKS if s.decodes else num_missing_blocks(s) for s in self._running)
        return self._pool.num_allocatable - promised

    def can_grow(self) -> bool:
        """Every sequence that decodes can have the block that it needs next."""
        num_allocatable = self._pool.num_allocatable
        return len(self._running) <= num_allocatable or self._num_growing() <= num_allocatable

    def make_spare(self, n: int, sequence: Sequence) -> bool:
        """Tries to have `n` spare blocks for a sequence that acquires KV, at the cost of its juniors that only wait."""
        aged = self._waiting.aged_head
        if aged and aged.key < self._waiting.seniority(sequence) and not self._siblings.must_wait(aged.sequence):
            return False
        while self.num_spare_blocks() < n:
            if not self.shed(junior_to=sequence):
                return False
        return True

    def make_way(self, aside: frozenset[str], *, max_sequences: int) -> None:
        """Preempts sequences of tenants that step aside while others cannot start for want of slots or blocks."""
        expecting = [e.sequence for e in self._waiting if e.sequence.tenant not in aside]
        yielding = sorted((s for s in self._running if s.tenant in aside), key=preemption_cost)
        share = len(self._running) // 2
        while expecting and len(yielding) > share and not self._has_room_for(expecting[0], max_sequences):
            self._preempt(yielding.pop(0))

    def make_room_for_decodes(self) -> None:
        """Until they can grow, or nobody is left to yield."""
        while not self.can_grow() and self.yield_blocks():
            pass

    def yield_blocks(self) -> bool:
        """Somebody gives up blocks: one that only waits, else the cheapest running one unless it runs alone."""
        if self.shed():
            return True
        if len(self._running) > 1:
            self._preempt(min(self._running, key=preemption_cost))
            return True
        return False

    def shed(self, *, junior_to: Sequence | None = None) -> bool:
        """One that ended, else the most junior one that holds blocks without running leaves them to the cache."""
        if self._tables.shed_kept():
            return True
        seniority = self._waiting.seniority
        holders = [s for s in self._not_running() if s.block_table]
        if junior_to is not None:
            limit = seniority(junior_to)
            holders = [s for s in holders if seniority(s) > limit]
        if not holders:
            return False
        junior = max(holders, key=seniority)
        self._tables.drop(junior)
        if not junior.num_preemptions:
            junior.num_cached_tokens = 0
        return True

    def _num_growing(self) -> int:
        """Sequences that need a block for the next token that they decode."""
        block_size = self._pool.block_size
        return sum(
            1
            for s in self._running
            if s.decodes and (s.borrows_tail or s.num_computed_tokens == len(s.block_table) * block_size)
        )

    def _has_room_for(self, sequence: Sequence, max_sequences: int) -> bool:
        has_slot = len(self._running) < max_sequences
        return has_slot and self._tables.num_missing_blocks(sequence) <= self.num_spare_blocks()

    def _not_running(self) -> Iterator[Sequence]:
        yield from self._acquiring.values()
        for entry in self._waiting:
            yield entry.sequence

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._tables.drop(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_preemptions += 1
        self.count += 1
        self._waiting.add(sequence)
