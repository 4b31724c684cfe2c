"""The directory hears of the union of arena and tier: a block is revoked when the last copy is gone."""

from services.kv_transfer.hints import BlockHints
from shared.identity import BlockHash

A, B, C = (BlockHash(bytes([i]) * 16) for i in range(3))


class Published:
    """Stands in for the directory's holder."""

    def __init__(self):
        self.known = set()

    def publish(self, sealed, evicted):
        self.known |= set(sealed)
        self.known -= set(evicted)


def hints_and_directory():
    hints = BlockHints()
    hints.holder = Published()
    return hints, hints.holder


def test_a_block_is_known_as_long_as_one_copy_is_left():
    hints, directory = hints_and_directory()
    hints.arena_changed([A, B], [])
    hints.tier_changed([A], [])
    hints.arena_changed([C], [A, B])
    assert directory.known == hints.held() == {A, C}
    hints.tier_changed([], [A])
    assert directory.known == hints.held() == {C}


def test_a_tier_copy_that_goes_does_not_hide_the_arenas():
    hints, directory = hints_and_directory()
    hints.arena_changed([A], [])
    hints.tier_changed([A], [])
    hints.tier_changed([], [A])
    assert directory.known == {A}


def test_a_worker_that_starts_over_replaces_its_blocks_and_not_the_tiers():
    hints, directory = hints_and_directory()
    hints.arena_changed([A, B], [])
    hints.tier_changed([B], [])
    hints.arena_replaced([C])
    assert directory.known == hints.held() == {B, C}
    hints.arena_replaced([])
    assert directory.known == hints.held() == {B}


def test_a_stale_hint_is_denied_once_somebody_came_for_it():
    hints, directory = hints_and_directory()
    directory.known = {A, B}
    hints.tier_changed([B], [])
    hints.deny([A])
    assert directory.known == {B}
    assert hints.stale_blocks == 1


def test_without_a_directory_everything_is_remembered_for_it():
    hints = BlockHints()
    hints.arena_changed([A], [])
    hints.tier_changed([B], [])
    assert hints.held() == {A, B}
