"""Blocks on disk: whole or not there, whenever the writer was killed."""

import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from services.kv_transfer.slot_store import SlotStore, StoredBlock
from shared.identity import BlockHash
from shared.transfer.checksum import block_checksum

BLOCK_BYTES = 24 << 10


def content(number, block_bytes=BLOCK_BYTES):
    return np.random.default_rng(number).integers(0, 256, block_bytes, dtype=np.uint8)


def named(number, slot):
    return StoredBlock(BlockHash(number.to_bytes(16, "little")), slot, block_checksum(content(number)), number)


@pytest.fixture
def store(tmp_path):
    store = SlotStore(tmp_path / "store", BLOCK_BYTES, 8)
    yield store
    store.close()


def assert_whole(store):
    for stored in store.load():
        target = np.zeros(BLOCK_BYTES, np.uint8)
        assert store.read(stored.slot, target) == stored.checksum
        assert (target == content(stored.stamp)).all()
        assert stored.block_hash == stored.stamp.to_bytes(16, "little")


def test_what_was_written_is_found_again_in_the_order_of_writing(tmp_path):
    with_two = SlotStore(tmp_path / "store", BLOCK_BYTES, 8)
    with_two.write(named(2, 5), content(2))
    with_two.write(named(1, 6), content(1))
    with_two.close()
    store = SlotStore(tmp_path / "store", BLOCK_BYTES, 8)
    assert store.load() == [named(1, 6), named(2, 5)]
    assert_whole(store)
    store.close()


def test_a_slot_that_is_written_again_holds_the_new_block_only(store):
    store.write(named(1, 3), content(1))
    store.write(named(2, 3), content(2))
    assert store.load() == [named(2, 3)]
    store.erase(3)
    assert store.load() == []


def test_an_entry_that_is_damaged_or_in_another_slots_place_does_not_count(store, tmp_path):
    for slot in range(3):
        store.write(named(slot + 1, slot), content(slot + 1))
    index = tmp_path / "store" / "index"
    raw = bytearray(index.read_bytes())
    raw[0] ^= 1
    raw[64:128] = raw[128:192]
    index.write_bytes(raw)
    assert [stored.slot for stored in store.load()] == [2]


def test_a_smaller_budget_gives_space_back(tmp_path):
    store = SlotStore(tmp_path / "store", BLOCK_BYTES, 8)
    for slot in range(8):
        store.write(named(slot + 1, slot), content(slot + 1))
    store.close()
    store = SlotStore(tmp_path / "store", BLOCK_BYTES, 3)
    assert [stored.slot for stored in store.load()] == [0, 1, 2]
    assert (tmp_path / "store" / "data").stat().st_size == 3 * BLOCK_BYTES
    store.close()


def test_two_processes_do_not_share_a_store(store, tmp_path):
    with pytest.raises(BlockingIOError):
        SlotStore(tmp_path / "store", BLOCK_BYTES, 8)


def test_data_that_a_power_cut_lost_does_not_match_its_checksum(store, tmp_path):
    store.write(named(1, 0), content(1))
    store.write(named(2, 1), content(2))
    os.truncate(tmp_path / "store" / "data", BLOCK_BYTES + 100)
    target = np.zeros(BLOCK_BYTES, np.uint8)
    assert store.read(0, target) == named(1, 0).checksum
    assert store.read(1, target) != named(2, 1).checksum


WRITER = """
import itertools, random, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_slot_store import BLOCK_BYTES, content, named
from services.kv_transfer.slot_store import SlotStore
store = SlotStore(Path(sys.argv[1]), BLOCK_BYTES, 8)
first = max([stored.stamp for stored in store.load()], default=0) + 1
blocks = [(named(number, random.randrange(8)), content(number)) for number in range(first, first + 64)]
print("writing", flush=True)
for stored, block in itertools.cycle(blocks):
    store.write(stored, block)
"""


def test_a_writer_killed_at_any_instant_leaves_whole_blocks_only(tmp_path):
    found = 0
    for _ in range(8):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "store"), os.path.dirname(__file__)], stdout=subprocess.PIPE
        )
        assert writer.stdout.readline() == b"writing\n"
        time.sleep(random.uniform(0, 0.02))
        writer.kill()
        writer.wait()
        store = SlotStore(tmp_path / "store", BLOCK_BYTES, 8)
        found += len(store.load())
        assert_whole(store)
        store.close()
    assert found


def test_start_up_reads_a_small_index_only(tmp_path):
    """64 bytes per slot: a terabyte of 2 MiB blocks is a 32 MiB index."""
    store = SlotStore(tmp_path / "store", 2 << 20, 100_000)
    big = named(1, 99_999)
    store.write(big, content(1, 2 << 20))
    started_s = time.monotonic()
    assert store.load() == [big]
    assert time.monotonic() - started_s < 5
    store.close()
