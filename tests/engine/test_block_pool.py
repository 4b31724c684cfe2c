import pytest

from shared.engine.block_pool import MISSING, BlockPool
from shared.errors import InternalError


def name(i):
    return i.to_bytes(16, "little")


def seal_new(pool, *names):
    """Allocates and seals one block per name; each keeps one reference."""
    return [pool.seal(pool.allocate(1)[0], name(i)) for i in names]


def release(pool, blocks):
    for block in blocks:
        pool.unref(block)


def test_blocks_run_out_without_side_effects():
    pool = BlockPool(4, 16)
    assert pool.allocate(5) is None
    assert pool.counts().free == 4
    assert len(set(pool.allocate(4))) == 4
    assert pool.allocate(1) is None
    assert pool.allocate(0) == []


def test_private_block_is_free_after_its_last_reference():
    pool = BlockPool(2, 16)
    (block,) = pool.allocate(1)
    pool.unref(block)
    assert pool.counts().free == 2
    assert pool.drain_events() == ([], [])


def test_sealed_block_stays_in_the_cache_and_is_found_by_name():
    pool = BlockPool(4, 16)
    blocks = seal_new(pool, 1, 2)
    release(pool, blocks)
    assert pool.counts().cached == 2
    assert pool.match_prefix([name(1), name(2), name(3)]) == blocks
    assert pool.match_prefix([name(3), name(1)]) == []


def test_eviction_takes_the_least_recently_used_block():
    pool = BlockPool(3, 16)
    first, second, third = seal_new(pool, 1, 2, 3)
    release(pool, [first, second, third])
    pool.ref(first)
    pool.unref(first)
    assert pool.allocate(1) == [second]
    assert pool.drain_events() == ([name(1), name(3)], [])  # 2 came and went between two drains
    assert pool.allocate(1) == [third]
    assert pool.drain_events() == ([], [name(3)])


def test_eviction_never_takes_referenced_pinned_or_quarantined_blocks():
    pool = BlockPool(4, 16)
    used, pinned, cached = seal_new(pool, 1, 2, 3)
    assert pool.pin(name(2)) == pinned
    release(pool, [pinned, cached])
    (slot,) = pool.allocate(1)
    pool.quarantine(slot)
    assert pool.allocate(1) == [cached]
    assert pool.allocate(1) is None
    counts = pool.counts()
    assert (counts.used, counts.pinned, counts.quarantined, counts.free, counts.cached) == (2, 1, 1, 0, 0)
    assert pool.match_prefix([name(1), name(2)]) == [used, pinned]


def test_second_block_of_one_name_gives_way_to_the_first():
    pool = BlockPool(4, 16)
    (first,) = seal_new(pool, 1)
    (second,) = pool.allocate(1)
    assert pool.seal(second, name(1)) == first
    assert pool.references(first) == 2
    assert pool.counts().free == 3


def test_second_block_of_one_name_revives_a_cached_first():
    pool = BlockPool(2, 16)
    (first,) = seal_new(pool, 1)
    (second,) = pool.allocate(1)
    pool.unref(first)
    assert pool.seal(second, name(1)) == first
    assert pool.counts().used == 1
    pool.check_integrity()


def test_evicted_and_resealed_name_is_no_event():
    pool = BlockPool(1, 16)
    release(pool, seal_new(pool, 1))
    pool.drain_events()
    release(pool, pool.allocate(1))  # evicts 1
    release(pool, seal_new(pool, 1))
    assert not pool.has_events


def test_pin_of_an_unknown_name_is_missing():
    pool = BlockPool(1, 16)
    assert pool.pin(name(9)) == MISSING


def test_pinned_and_used_block_counts_as_used_until_its_references_end():
    pool = BlockPool(1, 16)
    (block,) = seal_new(pool, 1)
    pool.pin(name(1))
    assert (pool.counts().used, pool.counts().pinned) == (1, 0)
    pool.unref(block)
    assert (pool.counts().used, pool.counts().pinned) == (0, 1)
    pool.unpin(block)
    assert pool.counts().cached == 1


def test_quarantined_block_is_free_only_after_release():
    pool = BlockPool(1, 16)
    (slot,) = pool.allocate(1)
    pool.quarantine(slot)
    assert pool.allocate(1) is None
    pool.release_quarantined(slot)
    assert pool.allocate(1) == [slot]


def test_sealed_block_cannot_be_quarantined_or_renamed():
    pool = BlockPool(1, 16)
    (block,) = seal_new(pool, 1)
    with pytest.raises(AssertionError):
        pool.quarantine(block)
    with pytest.raises(AssertionError):
        pool.seal(block, name(2))


def test_save_ahead_offers_the_oldest_quarter_only_under_pressure():
    pool = BlockPool(16, 16)
    blocks = seal_new(pool, *range(8))
    release(pool, blocks)
    assert pool.take_unsaved(8) == []  # half of all are free
    blocks += seal_new(pool, *range(8, 12))
    release(pool, blocks[8:])
    assert pool.take_unsaved(8) == [(name(i), blocks[i]) for i in range(3)]
    assert pool.take_unsaved(8) == []
    assert pool.counts().pinned == 3


def test_saved_blocks_are_evicted_first_and_failed_ones_offered_again():
    pool = BlockPool(12, 16)
    blocks = seal_new(pool, *range(12))
    release(pool, blocks)
    taken = pool.take_unsaved(3)
    for (_, block), ok in zip(taken, (True, False, True), strict=True):
        pool.saved(block, ok=ok)
    pool.check_integrity()
    assert pool.take_unsaved(3) == [taken[1]]
    pool.saved(blocks[1], ok=True)
    assert pool.allocate(3) == [blocks[1], blocks[2], blocks[0]]  # the free list is a stack
    assert pool.allocate(1) == [blocks[3]]


def test_block_used_while_it_is_saved_is_not_evicted_first():
    pool = BlockPool(4, 16)
    blocks = seal_new(pool, *range(4))
    release(pool, blocks)
    ((_, block),) = pool.take_unsaved(1)
    pool.ref(block)
    pool.saved(block, ok=True)
    pool.unref(block)
    assert pool.allocate(1) == [blocks[1]]


def test_integrity_check_names_a_violation():
    pool = BlockPool(4, 16)
    pool._free.append(pool._free[0])
    with pytest.raises(InternalError, match="free twice"):
        pool.check_integrity()


def test_adopted_blocks_are_cached_in_order_and_names_that_come_twice_count_once():
    told = []
    pool = BlockPool(6, 4, lambda block, name: told.append((block, name)))
    names = [name(i) for i in range(3)]
    pool.adopt([(4, names[0]), (1, names[1]), (2, names[0])])
    pool.check_integrity()
    assert pool.match_prefix(names) == [4, 1]
    assert (pool.counts().free, pool.counts().cached) == (4, 2)
    assert pool.drain_events() == (names[:2], [])
    assert told == []  # the table knows them already
    taken = pool.allocate(5)
    assert 4 in taken
    assert told == [(4, None)]  # the longest sealed goes first, and is recorded as gone before anybody writes it


def test_every_name_is_recorded_when_it_is_given_and_before_its_block_is_given_away():
    told = []
    pool = BlockPool(2, 4, lambda block, name: told.append((block, name)))
    sealed = name(7)
    (block,) = pool.allocate(1)
    pool.seal(block, sealed)
    pool.unref(block)
    pool.allocate(2)
    assert told == [(block, sealed), (block, None)]
