"""The host tier by itself: budget, order of eviction, pins, damage."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from services.kv_transfer.host_tier import HostTier
from shared.identity import BlockHash, Fingerprint
from shared.transfer.checksum import block_checksum

BLOCK_BYTES = 4096
NAMES = [BlockHash(bytes([i]) * 16) for i in range(20)]


def data(i):
    return np.full(BLOCK_BYTES, i, np.uint8)


class Tier(HostTier):
    """Records what it tells the directory."""

    def __init__(self, num_blocks, executor):
        self.announced = set()
        super().__init__(num_blocks * BLOCK_BYTES + 100, executor, self._note)
        self.adopt(Fingerprint("model-a"), BLOCK_BYTES)

    def _note(self, added, dropped):
        self.announced |= set(added)
        self.announced -= set(dropped)

    async def save_numbers(self, *numbers):
        return await self.save([NAMES[i] for i in numbers], [data(i) for i in numbers])

    def numbers(self):
        assert self.announced == set(self.hashes())
        return [block_hash[0] for block_hash in self.hashes()]


@pytest.fixture
def executor():
    with ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.fixture
def tier(executor):
    return Tier(4, executor)


async def test_saved_blocks_are_found_with_the_checksum_of_their_bytes(tier):
    assert await tier.save_numbers(1, 2) == [True, True]
    one, none, two = tier.pin([NAMES[1], NAMES[9], NAMES[2]])
    assert none is None
    for entry, number in ((one, 1), (two, 2)):
        assert (entry.block == number).all()
        assert entry.checksum == block_checksum(data(number))
    tier.unpin([one, none, two])


async def test_the_budget_holds_and_the_least_recently_used_goes_first(tier):
    await tier.save_numbers(0, 1, 2, 3)
    tier.unpin(tier.pin([NAMES[0]]))
    assert await tier.save_numbers(4, 5) == [True, True]
    assert tier.numbers() == [3, 4, 5, 0]
    assert tier.used_bytes <= tier.budget_bytes
    await tier.save_numbers(3)  # saved again: that is a use
    await tier.save_numbers(6)
    assert tier.numbers() == [5, 6, 0, 3]


async def test_a_prompts_first_blocks_outlive_its_last_ones(tier):
    await tier.save_numbers(0, 1, 2, 3)
    tier.unpin(tier.pin(NAMES[:4]))
    await tier.save_numbers(4, 5)
    assert set(tier.numbers()) == {0, 1, 4, 5}


async def test_pinned_blocks_stay_and_what_finds_no_room_is_not_saved(tier):
    await tier.save_numbers(0, 1, 2, 3)
    pinned = tier.pin(NAMES[:3])
    assert await tier.save_numbers(4, 5) == [True, False]
    assert set(tier.numbers()) == {0, 1, 2, 4}
    assert all((entry.block == i).all() for i, entry in enumerate(pinned))
    tier.unpin(pinned)
    assert await tier.save_numbers(5) == [True]


async def test_a_corrupt_block_is_dropped_and_its_slot_kept_until_the_last_reader_left(tier):
    await tier.save_numbers(0, 1, 2, 3)
    first, second = tier.pin(NAMES[:1]), tier.pin(NAMES[:1])
    tier.discard_corrupt(NAMES[0])
    tier.discard_corrupt(NAMES[0])
    assert (tier.corrupt, tier.numbers()) == (1, [1, 2, 3])
    tier.unpin(first)
    await tier.save_numbers(4)
    assert 1 not in tier.numbers()  # slot 0 is still being read: another block had to go
    assert (second[0].block == 0).all()
    tier.unpin(second)
    await tier.save_numbers(5)
    assert tier.numbers() == [2, 3, 4, 5]


async def test_blocks_of_another_model_are_dropped_and_memory_in_use_stays_valid(tier):
    await tier.save_numbers(0, 1)
    pinned = tier.pin(NAMES[:2])
    tier.adopt(Fingerprint("model-a"), BLOCK_BYTES)
    assert len(tier) == 2
    tier.adopt(Fingerprint("model-b"), 2 * BLOCK_BYTES)
    assert (len(tier), tier.capacity, tier.announced) == (0, 2, set())
    assert (pinned[1].block == 1).all()
    tier.unpin(pinned)
    big = np.full(2 * BLOCK_BYTES, 7, np.uint8)
    assert await tier.save(NAMES[7:10], [big] * 3) == [True, True, False]


async def test_a_tier_of_no_size_saves_nothing(executor):
    tier = Tier(0, executor)
    assert await tier.save_numbers(0, 1) == [False, False]
    assert tier.pin(NAMES[:1]) == [None]


async def test_a_cancelled_save_leaves_no_slot_behind(tier):
    for _ in range(5):
        saving = asyncio.create_task(tier.save_numbers(0, 1, 2, 3))
        await asyncio.sleep(0)
        saving.cancel()
        await asyncio.wait({saving})
        assert tier.numbers() == []
    assert await tier.save_numbers(4, 5, 6, 7) == [True] * 4


async def test_one_block_saved_twice_at_once_is_kept_once(tier):
    await asyncio.gather(tier.save_numbers(0, 1), tier.save_numbers(1, 2))
    assert sorted(tier.numbers()) == [0, 1, 2]
