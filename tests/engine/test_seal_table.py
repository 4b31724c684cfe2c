"""What survives a worker: the truth about its arena, whenever it was killed."""

import random
import subprocess
import sys
import time

import pytest

from shared.errors import ConfigurationError
from shared.kv_arena import SharedArena
from shared.seal_table import SealTable

NAMES = [bytes([i]) * 16 for i in range(1, 30)]


@pytest.fixture
def table(tmp_path):
    return SealTable.create(tmp_path / "t", 8, 4096, "fp")


def reopened(table):
    return SealTable.open(table.path, 8, 4096, "fp")


def test_sealed_slots_are_found_in_the_order_of_sealing(table):
    table.record(5, NAMES[0])
    table.record(2, NAMES[1])
    assert [(slot.block_id, slot.name) for slot in reopened(table).sealed()] == [(5, NAMES[0]), (2, NAMES[1])]


def test_a_slot_that_was_given_away_is_gone_and_the_next_block_has_another_stamp(table):
    table.record(5, NAMES[0])
    first = table.slot(5)
    table.record(5, None)
    assert reopened(table).sealed() == []
    table.record(5, NAMES[0])
    assert table.slot(5).stamp > first.stamp
    assert reopened(table).slot(5) == table.slot(5)


def test_stamps_go_on_after_a_restart(table):
    table.record(1, NAMES[0])
    again = reopened(table)
    again.record(2, NAMES[1])
    assert [slot.block_id for slot in again.sealed()] == [1, 2]


def test_a_checksum_belongs_to_one_sealing(table):
    table.record(3, NAMES[0])
    seen = table.slot(3)
    assert table.unchecked() == [seen]
    assert table.note_checksum(seen, 77)
    assert (table.slot(3).checksum, table.unchecked()) == (77, [])
    table.record(3, None)
    table.record(3, NAMES[0])
    assert table.slot(3).checksum is None
    assert not table.note_checksum(seen, 77)


def test_a_checksum_that_was_written_too_late_counts_for_nothing(table):
    table.record(3, NAMES[0])
    table.note_checksum(table.slot(3), 77)
    entry = bytes(table._buffer[64 + 3 * 64 + 32 : 64 + 3 * 64 + 48])
    table.record(3, NAMES[1])
    table._buffer[64 + 3 * 64 + 32 : 64 + 3 * 64 + 48] = entry
    assert table.slot(3).checksum is None


def test_an_entry_written_in_part_or_in_another_slots_place_does_not_count(table):
    for slot in range(3):
        table.record(slot, NAMES[slot])
    table._buffer[64] ^= 1
    table._buffer[64 + 64 : 64 + 128] = table._buffer[64 + 128 : 64 + 192]
    assert [slot.block_id for slot in table.sealed()] == [2]


def test_keeping_some_clears_the_others(table):
    for slot in range(5):
        table.record(slot, NAMES[slot])
    table.keep_only({1, 4})
    assert [slot.block_id for slot in table.sealed()] == [1, 4]


@pytest.mark.parametrize(
    ("num_blocks", "block_bytes", "fingerprint"), [(9, 4096, "fp"), (8, 8192, "fp"), (8, 4096, "x")]
)
def test_a_table_of_another_arena_is_refused(table, num_blocks, block_bytes, fingerprint):
    with pytest.raises(ConfigurationError):
        SealTable.open(table.path, num_blocks, block_bytes, fingerprint)


WORKER = """
import itertools, random, sys
from pathlib import Path
import numpy as np
from shared.kv_arena import SharedArena
from shared.seal_table import SealTable
folder = Path(sys.argv[1])
arena = SharedArena.create(folder / "arena", 8, 64 << 10)
table = SealTable.create(folder / "table", 8, 64 << 10, "fp")
print("writing", flush=True)
for number in itertools.count(1):
    slot = random.randrange(8)
    table.record(slot, None)
    arena.blocks[slot] = number % 251
    table.record(slot, number.to_bytes(16, "little"))
"""


def test_whatever_the_table_of_a_killed_worker_says_is_in_the_arena(tmp_path):
    found = 0
    for _ in range(8):
        worker = subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path)], stdout=subprocess.PIPE)
        assert worker.stdout.readline() == b"writing\n"
        time.sleep(random.uniform(0, 0.02))
        worker.kill()
        worker.wait()
        arena = SharedArena.open(tmp_path / "arena", 8, 64 << 10)
        for slot in SealTable.open(tmp_path / "table", 8, 64 << 10, "fp").sealed():
            found += 1
            assert (arena.blocks[slot.block_id] == int.from_bytes(slot.name, "little") % 251).all()
    assert found
