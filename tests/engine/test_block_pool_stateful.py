"""Any order of allocate, seal, reference, borrow, copy, pin, save, quarantine and eviction keeps the pool whole."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shared.engine.block_pool import MISSING, BlockPool

NUM_BLOCKS = 10
names = st.integers(0, 15).map(lambda i: i.to_bytes(16, "little"))


class PoolMachine(RuleBasedStateMachine):
    """Keeps its own account of who holds what, and compares."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, 16)
        self.private = []  # allocated, unnamed: one entry per owner
        self.borrowed = []  # one entry per borrower
        self.copied = []  # sources of copies under way
        self.sealed = []  # (block, name), one entry per reference
        self.pins = []
        self.saving = []
        self.quarantined = []
        self.published = set()  # what a directory would believe

    def take(self, entries, data):
        return entries.pop(data.draw(st.integers(0, len(entries) - 1)))

    @rule(n=st.integers(0, NUM_BLOCKS + 1))
    def allocate(self, n):
        possible = self.pool.num_allocatable
        blocks = self.pool.allocate(n)
        assert (blocks is not None) == (n <= possible)
        held = {b for b, _ in self.sealed} | set(self.private) | set(self.pins) | set(self.quarantined)
        held |= {block for _, block in self.saving} | set(self.borrowed) | set(self.copied)
        assert not held & set(blocks or [])
        self.private += blocks or []

    @precondition(lambda self: self.private)
    @rule(data=st.data(), name=names)
    def seal(self, data, name):
        block = self.take(self.private, data)
        first = self.pool.match_prefix([name])
        sealed = self.pool.seal(block, name)
        assert [sealed] == (first or [block])
        self.sealed.append((sealed, name))

    @precondition(lambda self: self.private)
    @rule(data=st.data())
    def free(self, data):
        self.pool.unref(self.take(self.private, data))

    @precondition(lambda self: self.private or self.sealed or self.borrowed)
    @rule(data=st.data())
    def borrow(self, data):
        block = data.draw(st.sampled_from(self.private + [b for b, _ in self.sealed] + self.borrowed))
        self.pool.borrow(block)
        self.borrowed.append(block)

    @precondition(lambda self: self.borrowed)
    @rule(data=st.data())
    def detach(self, data):
        index = data.draw(st.integers(0, len(self.borrowed) - 1))
        block, others = self.borrowed[index], self.borrowed[:index] + self.borrowed[index + 1 :]
        is_alone = (
            block not in self.private + others and self.pool.references(block) == 1 and block not in self.named_blocks()
        )
        possible = self.pool.num_allocatable
        own = self.pool.detach(block)
        assert (own == block) == is_alone
        if own is None:
            assert not possible
            return
        del self.borrowed[index]
        self.private.append(own)
        if own != block:
            assert own not in self.copied
            self.copied.append(block)

    @precondition(lambda self: self.copied)
    @rule(data=st.data())
    def end_copy(self, data):
        self.pool.unpin(self.take(self.copied, data))

    @precondition(lambda self: self.borrowed)
    @rule(data=st.data())
    def give_back(self, data):
        self.pool.unref(self.take(self.borrowed, data))

    def named_blocks(self):
        """Blocks in the index."""
        return set(self.pool.match_prefix(self.pool.sealed_names()))

    @rule(wanted=st.lists(names, max_size=4))
    def reference_a_prefix(self, wanted):
        for block, name in zip(self.pool.match_prefix(wanted), wanted, strict=False):
            self.pool.ref(block)
            self.sealed.append((block, name))

    @precondition(lambda self: self.sealed)
    @rule(data=st.data())
    def unreference(self, data):
        self.pool.unref(self.take(self.sealed, data)[0])

    @rule(name=names)
    def pin(self, name):
        block = self.pool.pin(name)
        assert (block == MISSING) == (not self.pool.match_prefix([name]))
        if block != MISSING:
            self.pins.append(block)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data):
        self.pool.unpin(self.take(self.pins, data))

    @rule(limit=st.integers(1, 3))
    def begin_saving(self, limit):
        self.saving += self.pool.take_unsaved(limit)

    @precondition(lambda self: self.saving)
    @rule(data=st.data(), ok=st.booleans())
    def end_saving(self, data, ok):
        self.pool.saved(self.take(self.saving, data)[1], ok=ok)

    @precondition(lambda self: set(self.private) - set(self.borrowed + self.copied))
    @rule(data=st.data())
    def quarantine(self, data):
        block = data.draw(st.sampled_from(sorted(set(self.private) - set(self.borrowed + self.copied))))
        self.private.remove(block)
        self.pool.quarantine(block)
        self.quarantined.append(block)

    @precondition(lambda self: self.quarantined)
    @rule(data=st.data())
    def release_quarantined(self, data):
        self.pool.release_quarantined(self.take(self.quarantined, data))

    @rule()
    def publish(self):
        sealed, evicted = self.pool.drain_events()
        assert not self.published & set(sealed)
        assert set(evicted) <= self.published
        self.published = (self.published | set(sealed)) - set(evicted)
        assert self.published == set(self.pool.sealed_names())

    @invariant()
    def is_whole(self):
        self.pool.check_integrity()

    @invariant()
    def held_blocks_keep_their_names(self):
        for block, name in self.sealed:
            assert self.pool.match_prefix([name]) == [block]
        for name, block in self.saving:
            assert self.pool.match_prefix([name]) == [block]

    @invariant()
    def an_unnamed_block_has_one_owner_at_most(self):
        assert len(set(self.private)) == len(self.private)
        for block in self.private + self.borrowed:
            held = self.private + self.borrowed + [b for b, _ in self.sealed]
            assert self.pool.references(block) == held.count(block)

    @invariant()
    def counts_agree(self):
        counts = self.pool.counts()
        used = {b for b, _ in self.sealed} | set(self.private) | set(self.borrowed)
        pinned = (set(self.pins) | set(self.copied) | {b for _, b in self.saving}) - used
        assert (counts.used, counts.pinned, counts.quarantined) == (len(used), len(pinned), len(self.quarantined))
        assert counts.free + counts.cached == self.pool.num_allocatable

    def teardown(self):
        for block in self.private + [b for b, _ in self.sealed] + self.borrowed:
            self.pool.unref(block)
        for block in self.pins + self.copied:
            self.pool.unpin(block)
        for _, block in self.saving:
            self.pool.saved(block, ok=True)
        for block in self.quarantined:
            self.pool.release_quarantined(block)
        assert self.pool.num_allocatable == NUM_BLOCKS
        self.pool.check_integrity()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)
