"""Any order of allocate, seal, reference, pin, save, quarantine and eviction keeps the pool whole."""

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
        self.private = []  # allocated, unnamed
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
        held |= {block for _, block in self.saving}
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

    @precondition(lambda self: self.private)
    @rule(data=st.data())
    def quarantine(self, data):
        block = self.take(self.private, data)
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
    def counts_agree(self):
        counts = self.pool.counts()
        used = {b for b, _ in self.sealed} | set(self.private)
        pinned = (set(self.pins) | {b for _, b in self.saving}) - used
        assert (counts.used, counts.pinned, counts.quarantined) == (len(used), len(pinned), len(self.quarantined))
        assert counts.free + counts.cached == self.pool.num_allocatable

    def teardown(self):
        for block in self.private + [b for b, _ in self.sealed]:
            self.pool.unref(block)
        for block in self.pins:
            self.pool.unpin(block)
        for _, block in self.saving:
            self.pool.saved(block, ok=True)
        for block in self.quarantined:
            self.pool.release_quarantined(block)
        assert self.pool.num_allocatable == NUM_BLOCKS
        self.pool.check_integrity()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)
