"""Host tier and disk together: demotion, promotion, restart, and disks that fail."""

import asyncio
import errno
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import numpy as np
import pytest

from services.kv_transfer import disk_tier
from services.kv_transfer.disk_tier import DiskState
from services.kv_transfer.slot_store import SlotStore
from services.kv_transfer.tiers import Tiers
from shared.identity import BlockHash, Fingerprint

BLOCK_BYTES = 8192
NAMES = [BlockHash(bytes([i]) * 16) for i in range(40)]
MODEL = Fingerprint("model-a")


def data(i):
    return np.full(BLOCK_BYTES, i, np.uint8)


class Bench:
    """Tiers and what they told the directory."""

    def __init__(self, tiers, announced):
        self.tiers, self.announced = tiers, announced

    async def save(self, *numbers):
        saved = await self.tiers.save([NAMES[i] for i in numbers], [data(i) for i in numbers])
        await self.tiers.flush(10)
        return saved

    async def copy_out(self, *numbers):
        """Numbers whose bytes arrived whole, and the outcome."""
        targets = [np.zeros(BLOCK_BYTES, np.uint8) for _ in numbers]
        copied = await self.tiers.copy_out([NAMES[i] for i in numbers], targets)
        good = [number for number, ok in zip(numbers, copied.verified, strict=True) if ok]
        assert all((targets[numbers.index(i)] == i).all() for i in good)
        return good, copied

    def held(self):
        assert self.announced == set(self.tiers.memory.hashes()) | {h for h in NAMES if h in self.tiers.disk}
        return sorted(h[0] for h in self.announced)


@asynccontextmanager
async def running(path, memory=4, disk=16, fingerprint=MODEL):
    announced = set()

    def note(added, dropped):
        announced.update(added)
        announced.difference_update(dropped)

    with ThreadPoolExecutor(2) as executor:
        tiers = Tiers(memory * BLOCK_BYTES, disk * BLOCK_BYTES, path, executor, note)
        await tiers.adopt(fingerprint, BLOCK_BYTES)
        demoting = asyncio.create_task(tiers.run())
        yield Bench(tiers, announced)
        demoting.cancel()
        await asyncio.wait({demoting})
        await tiers.disk.close()


@pytest.fixture
async def bench(tmp_path):
    async with running(tmp_path) as bench:
        yield bench


async def test_what_memory_lets_go_of_is_read_from_disk(bench):
    for first in range(0, 12, 4):
        assert await bench.save(*range(first, first + 4)) == [True] * 4
    assert len(bench.tiers.memory) == 4
    assert bench.held() == list(range(12))
    good, copied = await bench.copy_out(*range(13))
    assert good == list(range(12))
    assert (copied.missing, copied.mismatched) == (1, 0)


async def test_a_pin_brings_blocks_from_disk_into_memory(bench):
    await bench.save(0, 1, 2, 3)
    await bench.save(4, 5, 6, 7)
    entries = await bench.tiers.pin([NAMES[i] for i in (0, 30, 5, 1)])
    assert [None if entry is None else int(entry.block[0]) for entry in entries] == [0, None, 5, 1]
    assert NAMES[0] in bench.tiers.memory
    bench.tiers.unpin(entries)


async def test_a_pin_of_more_than_memory_holds_finds_what_fits(bench):
    for first in range(0, 12, 4):
        await bench.save(*range(first, first + 4))
    entries = await bench.tiers.pin(NAMES[:8])
    assert sum(entry is not None for entry in entries) == 4
    bench.tiers.unpin(entries)


async def test_a_restart_finds_everything_and_goes_on(tmp_path):
    async with running(tmp_path) as bench:
        for first in range(0, 12, 4):
            await bench.save(*range(first, first + 4))
    async with running(tmp_path) as bench:
        assert bench.held() == list(range(12))
        assert (await bench.copy_out(*range(12)))[0] == list(range(12))
        await bench.save(20, 21, 22, 23)
        await bench.save(24, 25)
        assert len(bench.tiers.disk) == 16
        assert set(range(20, 26)) <= set(bench.held())


async def test_the_budget_holds_and_hot_blocks_outlive_a_scan(bench):
    await bench.save(0, 1)
    assert (await bench.copy_out(0, 1))[0] == [0, 1]
    await bench.save(2, 3, 4, 5)
    await bench.copy_out(0, 1)  # from disk by now
    for first in range(6, 38, 4):
        await bench.save(*range(first, first + 4))
    assert len(bench.tiers.disk) == 16
    assert {0, 1} <= set(bench.held())


async def test_blocks_of_other_models_are_deleted_from_disk(tmp_path):
    async with running(tmp_path) as bench:
        await bench.save(0, 1, 2)
    async with running(tmp_path, fingerprint=Fingerprint("model-b")) as bench:
        assert bench.held() == []
        assert [path.name for path in tmp_path.iterdir()] == [f"model-b-{BLOCK_BYTES}"]
        await bench.save(5)
        assert bench.held() == [5]
    async with running(tmp_path) as bench:
        assert bench.held() == []


async def test_a_block_damaged_on_disk_is_never_served(bench, tmp_path):
    await bench.save(0, 1, 2, 3)
    await bench.save(4, 5, 6, 7)
    path = tmp_path / f"{MODEL}-{BLOCK_BYTES}" / "data"
    raw = bytearray(path.read_bytes())
    raw[BLOCK_BYTES + 7] ^= 4
    path.write_bytes(raw)
    damaged = raw[BLOCK_BYTES]
    good, copied = await bench.copy_out(0, 1, 2, 3)
    assert sorted([*good, damaged]) == [0, 1, 2, 3]
    assert (copied.mismatched, bench.tiers.disk.counts.corrupt) == (1, 1)
    assert damaged not in bench.held()
    assert await bench.tiers.pin([NAMES[damaged]]) == [None]


async def test_a_full_disk_is_no_error_and_serves_on(tmp_path, monkeypatch):
    """/dev/full refuses every write with the error of a full disk."""
    (tmp_path / f"{MODEL}-{BLOCK_BYTES}").mkdir()
    (tmp_path / f"{MODEL}-{BLOCK_BYTES}" / "data").symlink_to("/dev/full")
    async with running(tmp_path) as bench:
        assert await bench.save(0, 1, 2, 3) == [True] * 4
        assert bench.tiers.disk.state is DiskState.READ_ONLY
        assert bench.tiers.disk.counts.failures == 1
        assert bench.held() == [0, 1, 2, 3]
        assert (await bench.copy_out(0, 3))[0] == [0, 3]
        assert await bench.save(4) == [True]
        assert bench.tiers.disk.counts.failures == 1  # left alone for a while


async def test_a_disk_that_was_full_is_used_once_it_has_room(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_tier, "RETRY_S", 0.0)
    monkeypatch.setattr(disk_tier, "LOOK_FOR_ROOM_S", 0.0)
    is_full = True

    def write(store, stored, block):
        if is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        real_write(store, stored, block)

    real_write = SlotStore.write
    monkeypatch.setattr(SlotStore, "write", write)
    monkeypatch.setattr(SlotStore, "room", lambda store: 0 if is_full else 6)
    async with running(tmp_path) as bench:
        await bench.save(0, 1, 2, 3)
        await bench.save(4, 5)
        assert (len(bench.tiers.disk), bench.tiers.disk.counts.failures) == (0, 1)  # nothing to try it with
        is_full = False
        for first in range(6, 22, 4):
            await bench.save(*range(first, first + 4))
        assert len(bench.tiers.disk) == 16
        bench.held()


async def test_on_a_full_disk_new_blocks_take_the_place_of_old_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_tier, "RETRY_S", 0.0)

    def write(store, stored, block):
        if stored.slot >= 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real_write(store, stored, block)

    real_write = SlotStore.write
    monkeypatch.setattr(SlotStore, "write", write)
    async with running(tmp_path) as bench:
        for first in range(0, 16, 4):
            await bench.save(*range(first, first + 4))
        assert len(bench.tiers.disk) == 4
        assert bench.tiers.disk.counts.failures == 1
        assert {12, 13, 14, 15} <= set(bench.held())


async def test_a_worker_that_goes_while_its_disk_is_opened_leaves_it_open_for_the_next(tmp_path):
    with ThreadPoolExecutor(2) as executor:
        tiers = Tiers(4 * BLOCK_BYTES, 16 * BLOCK_BYTES, tmp_path, executor, lambda added, dropped: None)
        first = asyncio.create_task(tiers.adopt(MODEL, BLOCK_BYTES))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait({first})
        assert first.cancelled()
        await tiers.adopt(MODEL, BLOCK_BYTES)
        assert tiers.disk.state is DiskState.ON
        await tiers.disk.close()


async def test_a_disk_that_fails_to_write_is_tried_again_later(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_tier, "RETRY_S", 0.2)
    (tmp_path / f"{MODEL}-{BLOCK_BYTES}").mkdir()
    (tmp_path / f"{MODEL}-{BLOCK_BYTES}" / "data").symlink_to("/proc/self/mem")  # an I/O error at low addresses
    async with running(tmp_path) as bench:
        assert await bench.save(0, 1) == [True, True]
        assert bench.tiers.disk.state is DiskState.READ_ONLY
        await asyncio.sleep(0.25)
        assert bench.tiers.disk.state is DiskState.ON
        await bench.save(2)
        assert bench.tiers.disk.counts.failures == 2
        assert bench.held() == [0, 1, 2]


async def test_a_disk_that_fails_to_read_is_given_up(tmp_path):
    async with running(tmp_path) as bench:
        await bench.save(0, 1, 2, 3)
        await bench.save(4, 5)
    data_file = tmp_path / f"{MODEL}-{BLOCK_BYTES}" / "data"
    data_file.unlink()
    data_file.symlink_to("/proc/self/mem")
    async with running(tmp_path) as bench:
        assert bench.held() == list(range(6))
        good, copied = await bench.copy_out(*range(6))
        assert (good, copied.mismatched) == ([], 6)
        assert bench.tiers.disk.state is DiskState.OFF
        assert bench.held() == []
        assert await bench.save(7) == [True]


async def test_a_path_that_cannot_be_used_leaves_memory_alone(tmp_path):
    (tmp_path / "file").write_text("")
    async with running(tmp_path / "file" / "below") as bench:
        assert bench.tiers.disk.state is DiskState.OFF
        assert await bench.save(0, 1) == [True, True]
        assert (await bench.copy_out(0, 1))[0] == [0, 1]


async def test_a_cancelled_copy_leaves_no_slot_being_read(bench):
    await bench.save(0, 1, 2, 3)
    await bench.save(4, 5, 6, 7)
    for _ in range(5):
        copying = asyncio.create_task(bench.copy_out(0, 1, 2, 3))
        await asyncio.sleep(0)
        copying.cancel()
        await asyncio.wait({copying})
    for first in range(8, 40, 4):
        assert await bench.save(*range(first, first + 4)) == [True] * 4
    assert len(bench.tiers.disk) == 16
