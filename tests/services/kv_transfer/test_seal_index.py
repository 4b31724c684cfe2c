"""Blocks found by name in a table that another process changes."""

import numpy as np
import pytest

from services.kv_transfer.seal_index import SealIndex
from shared.seal_table import SealTable

NAMES = [bytes([i]) * 16 for i in range(1, 20)]


@pytest.fixture
def table(tmp_path):
    return SealTable.create(tmp_path / "t", 4, 64, "fp")


@pytest.fixture
def index(table):
    return SealIndex(SealTable.open(table.path, 4, 64, "fp"))


def where(index, *numbers):
    return [None if slot is None else slot.block_id for slot in index.find([NAMES[i] for i in numbers])]


def test_what_is_sealed_later_is_found_at_the_next_question(table, index):
    table.record(2, NAMES[0])
    assert where(index, 0, 1) == [2, None]
    table.record(1, NAMES[1])
    assert where(index, 0, 1) == [2, 1]


def test_a_slot_given_away_or_given_to_another_block_is_not_found_under_the_old_name(table, index):
    table.record(2, NAMES[0])
    table.record(3, NAMES[1])
    assert where(index, 0, 1) == [2, 3]
    table.record(2, None)
    table.record(3, NAMES[2])
    assert where(index, 0, 1, 2) == [None, None, 3]


def test_a_block_that_moved_is_found_at_its_new_place(table, index):
    table.record(2, NAMES[0])
    assert where(index, 0) == [2]
    table.record(2, None)
    table.record(0, NAMES[0])
    assert where(index, 0) == [0]


def test_an_answer_says_later_whether_it_still_holds(table, index):
    table.record(2, NAMES[0])
    (slot,) = index.find([NAMES[0]])
    assert table.holds(slot)
    table.record(2, None)
    table.record(2, NAMES[0])  # the same block, but in between the slot may have been another's
    assert not table.holds(slot)


def test_names_of_blocks_that_are_gone_are_forgotten_in_time(table, index):
    rng = np.random.default_rng(0)
    for number in range(300):
        name = number.to_bytes(16, "little")
        table.record(int(rng.integers(4)), name)
        index.find([name])
    assert len(index._slots) <= 8
