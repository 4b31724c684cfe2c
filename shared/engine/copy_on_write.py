"""A block that one sequence has begun to fill, read by others that begin with the same tokens.

    owner      X [a b c d . .]   writes on in place: what it writes lies past what others borrowed
    borrower   X [a b c]         reads; before it writes it gets Y, a copy of X, and is Y's owner

Full blocks are shared by their names, see `BlockPool`; this is for the last, partly filled one. Its copy is made by
the step that first writes to it, before it writes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from shared.engine.block_pool import BlockPool
from shared.engine.sequence import Sequence
from shared.engine.step import BlockCopy
from shared.errors import InternalError


class CopyOnWrite:
    """Borrowed tails of block tables. Owned by `BlockTables`, guarded by the engine's lock."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._block_size = pool.block_size
        self._wanted: list[BlockCopy] = []
        self._under_way: list[BlockCopy] = []

    def borrow(self, sequence: Sequence, other: Sequence, max_tokens: int) -> None:
        """Extends a table of full blocks by the next block of another one, as far as their tokens are the same.

        Args:
            sequence: Which borrows; unchanged if there is nothing to be had.
            other: Its step may be in flight: any step that copies comes later.
            max_tokens: How many tokens of `sequence` may be taken as computed.
        """
        num_full = len(sequence.block_table)
        begin = num_full * self._block_size
        if sequence.num_computed_tokens != begin or len(other.block_table) <= num_full:
            return
        if _prefix_name(sequence, num_full) != _prefix_name(other, num_full):
            return
        end = min(max_tokens, other.num_computed_tokens, begin + self._block_size - 1)
        num_equal = _num_equal(sequence.token_ids[begin:end], other.token_ids[begin:end])
        if num_equal:
            self._pool.borrow(other.block_table[num_full])
            sequence.block_table.append(other.block_table[num_full])
            sequence.num_computed_tokens += num_equal
            sequence.borrows_tail = True

    def make_own(self, sequence: Sequence) -> bool:
        """Before a borrower is computed further: its last block is its own from now on. False if there is no room."""
        borrowed = sequence.block_table[-1]
        block = self._pool.detach(borrowed)
        if block is None:
            return False
        if block != borrowed:
            self._wanted.append(BlockCopy(borrowed, block))
            sequence.block_table[-1] = block
        sequence.borrows_tail = False
        return True

    def take(self) -> list[BlockCopy]:
        """The copies that the step just scheduled has to make."""
        copies, self._wanted = self._wanted, []
        self._under_way += copies
        return copies

    def end(self, copies: list[BlockCopy]) -> None:
        """The step that made these copies is over."""
        for copy in copies:
            self._under_way.remove(copy)
            self._pool.unpin(copy.source)

    def end_all(self) -> None:
        """No step will end any more."""
        self.end(self._under_way + self.take())

    def check_owners(self, holders: Iterable[Sequence]) -> None:
        """Verifies that no block that is not sealed has two sequences that would write to it.

        Raises:
            InternalError: One has.
        """
        owned = Counter(
            block for s in holders for block in s.block_table[s.num_sealed_blocks : len(s.block_table) - s.borrows_tail]
        )
        if shared := [block for block, count in owned.items() if count > 1]:
            raise InternalError(f"blocks {shared} have two owners")


def _prefix_name(sequence: Sequence, num_blocks: int) -> bytes | None:
    """Stands for the sequence's first blocks and all that they depend on; None if it is not known."""
    if not num_blocks:
        return sequence.namespace
    return sequence.block_hashes[num_blocks - 1] if num_blocks <= len(sequence.block_hashes) else None


def _num_equal(left: list[int], right: list[int]) -> int:
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        if a != b:
            return index
    return len(left)
