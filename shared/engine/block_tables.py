"""Which blocks a sequence holds: the pool owns blocks, the scheduler owns queues, this owns what is between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from shared.engine.block_pool import BlockPool
from shared.engine.copy_on_write import CopyOnWrite
from shared.engine.sequence import FinishReason, Pooling, Sequence
from shared.errors import InternalError
from shared.identity import BlockId, SequenceId, extend_hashes


class BlockTables:
    """Grows, seals and drops the block tables of sequences. Guarded by the engine's lock.

    A table is `[0, num_sealed_blocks)` sealed blocks, possibly shared, then at most the private ones that the running
    step fills, or one that is borrowed. Blocks are taken for tokens about to be computed and never earlier, so at most
    the last one of a sequence is partly used.

    Attributes:
        tails: Last blocks that are borrowed, and the copies of them.
        kept: Ended sequences that keep their blocks.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._block_size = pool.block_size
        self.tails = CopyOnWrite(pool)
        self.kept: dict[SequenceId, Sequence] = {}

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self._block_size)

    def num_missing_blocks(self, sequence: Sequence) -> int:
        """Blocks beyond its own that the sequence's present tokens need."""
        return self.blocks_for(sequence.num_tokens) - len(sequence.block_table) + sequence.borrows_tail

    def name_blocks(self, sequence: Sequence, num_blocks: int) -> None:
        """Extends `block_hashes` to the first `num_blocks` full blocks."""
        known = len(sequence.block_hashes)
        if known < num_blocks:
            parent = sequence.block_hashes[-1] if known else sequence.namespace
            tokens = sequence.token_ids[known * self._block_size : num_blocks * self._block_size]
            sequence.block_hashes += extend_hashes(parent, tokens, self._block_size)

    def reusable_tokens(self, sequence: Sequence) -> int:
        """Of how many leading tokens the KV may be somebody else's.

        A sequence that samples computes at least its last token, because it needs that token's logits; so does one that
        pools that token, and one that pools all computes those that it did not pool yet. One whose prompt is scored
        needs the logits of all that was not.
        """
        is_sealing = sequence.is_prefill_only and sequence.pooling is None
        num_tokens = sequence.num_tokens if is_sealing else sequence.num_tokens - 1
        if sequence.pooling is Pooling.MEAN:
            num_tokens = min(num_tokens, sequence.num_pooled_tokens)
        if sequence.is_scoring:
            num_tokens = sequence.num_scored_tokens
        return num_tokens

    def reusable_blocks(self, sequence: Sequence) -> int:
        """How many leading blocks may come from a cache."""
        return self.reusable_tokens(sequence) // self._block_size

    def match(self, sequence: Sequence) -> list[BlockId]:
        """Cached blocks that would continue the sequence's table; takes no references."""
        return self._pool.match_prefix(
            sequence.block_hashes[len(sequence.block_table) : self.reusable_blocks(sequence)]
        )

    def attach(self, sequence: Sequence, blocks: list[BlockId]) -> None:
        """Appends sealed blocks that continue the sequence, taking a reference to each."""
        if blocks:
            assert not sequence.borrows_tail, "a sequence borrows its last block only"
            for block in blocks:
                self._pool.ref(block)
            self._append_sealed(sequence, blocks)

    def borrow_tail(self, sequence: Sequence, other: Sequence) -> None:
        """After what was attached, extends the table by what another sequence computed of the next block."""
        if not sequence.borrows_tail:
            self.tails.borrow(sequence, other, self.reusable_tokens(sequence))

    def branch(self, sequence: Sequence, kept: Sequence) -> None:
        """Gives a new sequence the blocks that one which ended has kept, as far as their tokens are the same."""
        self.attach(sequence, self.match(sequence))
        self.borrow_tail(sequence, kept)

    def adopt(self, sequence: Sequence, block: BlockId) -> None:
        """Appends a sealed block whose reference the caller hands over."""
        self._append_sealed(sequence, [block])

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Makes room to write the KV of the first `num_tokens` tokens; False if the pool has none."""
        if sequence.borrows_tail and not self.tails.make_own(sequence):
            return False
        held = len(sequence.block_table)
        if num_tokens <= held * self._block_size:
            return True
        blocks = self._pool.allocate(self.blocks_for(num_tokens) - held)
        if blocks is None:
            return False
        sequence.block_table += blocks
        return True

    def seal_computed(self, sequence: Sequence, num_computed: int, *, may_merge: bool = True) -> bool:
        """Seals the blocks that became full with the first `num_computed` tokens; True if there were any.

        With `may_merge`, a block whose content is in the cache already is given up for that one. Not while a step
        reads it by its number: then it, and those after it, are left for a later call.
        """
        num_full = num_computed // self._block_size
        if num_full == sequence.num_sealed_blocks:
            return False
        self.name_blocks(sequence, num_full)
        table, hashes = sequence.block_table, sequence.block_hashes
        first = sequence.num_sealed_blocks
        for i in range(first, num_full):
            if not may_merge and self._pool.is_sealed(hashes[i]):
                break
            table[i] = self._pool.seal(table[i], hashes[i])
            sequence.num_sealed_blocks = i + 1
        return sequence.num_sealed_blocks > first

    def drop(self, sequence: Sequence) -> None:
        """Gives up all blocks of a sequence; sealed ones stay in the cache as long as there is room."""
        # Last block first: the head of a prefix is worth more than its tail, so the tail is evicted first.
        for block in reversed(sequence.block_table):
            self._pool.unref(block)
        self._clear(sequence)

    def keep(self, sequence: Sequence) -> None:
        """Leaves an ended sequence its blocks until `release`."""
        self.kept[sequence.sequence_id] = sequence

    def shed_kept(self) -> bool:
        """One that ended and keeps blocks leaves them to the cache; what branches off it computes the rest anew."""
        for sequence in self.kept.values():
            if sequence.block_table:
                self.drop(sequence)
                return True
        return False

    def release(self, sequence: Sequence) -> None:
        """Gives up what an ended sequence kept or pinned; does nothing the second time."""
        if self.kept.pop(sequence.sequence_id, None) is not None:
            self.drop(sequence)
        elif sequence.finish_reason is FinishReason.SEALED:  # else a step in flight may have what it still holds
            self.unpin(sequence)

    def pin(self, sequence: Sequence) -> None:
        """Turns the references of a sequence whose blocks are all sealed into pins; the table stays readable."""
        for block, name in zip(sequence.block_table, sequence.block_hashes, strict=False):
            self._pool.pin(name)
            self._pool.unref(block)

    def unpin(self, sequence: Sequence) -> None:
        """Undoes `pin` and clears the table; does nothing the second time."""
        for block in reversed(sequence.block_table):
            self._pool.unpin(block)
        self._clear(sequence)

    def check_references(self, holders: Iterable[Sequence], reserved: Iterable[BlockId]) -> None:
        """Verifies that the pool's references are exactly those of the holders' tables and of `reserved` slots.

        Raises:
            InternalError: They are not.
        """
        holders = [*holders, *self.kept.values()]
        self.tails.check_owners(holders)
        held = Counter(block for sequence in holders for block in sequence.block_table)
        held.update(reserved)
        for block in map(BlockId, range(self._pool.num_blocks)):
            if self._pool.references(block) != held[block]:
                raise InternalError(f"block {block}: {self._pool.references(block)} references, {held[block]} holders")

    def _append_sealed(self, sequence: Sequence, blocks: list[BlockId]) -> None:
        sequence.block_table += blocks
        sequence.num_sealed_blocks = len(sequence.block_table)
        sequence.num_computed_tokens = sequence.num_sealed_blocks * self._block_size
        if not sequence.num_preemptions:
            sequence.num_cached_tokens += len(blocks) * self._block_size

    @staticmethod
    def _clear(sequence: Sequence) -> None:
        sequence.block_table.clear()
        sequence.num_sealed_blocks = 0
        sequence.borrows_tail = False
        sequence.num_computed_tokens = 0
