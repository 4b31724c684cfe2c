"""Which blocks a worker copies to the host tier, and when."""

import asyncio
from types import SimpleNamespace

import pytest

from shared.engine.block_pool import BlockPool
from shared.identity import BlockHash
from shared.worker import save_ahead as module
from shared.worker.save_ahead import save_ahead


class StandInEngine:
    """A pool with `sealed` cached blocks, and what the engine says of itself."""

    def __init__(self, sealed):
        self.pool = BlockPool(32, 16)
        self.running, self.steps = 0, 1
        self.seal(range(sealed))

    def seal(self, numbers):
        blocks = self.pool.allocate(len(numbers))
        for number, block in zip(numbers, blocks, strict=True):
            self.pool.seal(block, BlockHash(bytes([number]) * 16))
        for block in blocks:
            self.pool.unref(block)

    def stats(self):
        return SimpleNamespace(running=self.running, waiting=0, waiting_for_kv=0, steps=self.steps)

    def take_unsaved(self, limit, *, everything):
        return self.pool.take_unsaved(limit, everything=everything)

    def saved(self, blocks, ok):
        for (_, block), is_saved in zip(blocks, ok, strict=True):
            self.pool.saved(block, ok=is_saved)


class StandInLink:
    """A host tier with room for so many blocks."""

    is_attached = True

    def __init__(self, room=99):
        self.room = room
        self.offers = []

    async def save(self, hashes, block_ids):
        self.offers.append(len(hashes))
        flags = [True] * min(self.room, len(hashes)) + [False] * max(0, len(hashes) - self.room)
        self.room -= sum(flags)
        return flags


async def run_for_some_turns(engine, link, *, memory_outlives_worker):
    saving = asyncio.create_task(save_ahead(engine, link, memory_outlives_worker=memory_outlives_worker))
    for _ in range(60):
        await asyncio.sleep(0)
    saving.cancel()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(module, "IDLE_S", 0)


async def test_an_idle_worker_whose_memory_dies_with_it_copies_everything_once():
    engine, link = StandInEngine(sealed=5), StandInLink()
    await run_for_some_turns(engine, link, memory_outlives_worker=False)
    assert link.offers == [5]
    engine.seal(range(5, 7))
    await run_for_some_turns(engine, link, memory_outlives_worker=False)
    assert link.offers == [5, 2]


@pytest.mark.parametrize(("running", "memory_outlives_worker"), [(1, False), (0, True)])
async def test_a_busy_worker_and_one_whose_memory_stays_wait_for_pressure(running, memory_outlives_worker):
    engine, link = StandInEngine(sealed=5), StandInLink()
    engine.running = running
    await run_for_some_turns(engine, link, memory_outlives_worker=memory_outlives_worker)
    assert link.offers == []


async def test_a_tier_that_takes_nothing_is_asked_again_after_the_next_step_only():
    engine, link = StandInEngine(sealed=5), StandInLink(room=0)
    await run_for_some_turns(engine, link, memory_outlives_worker=False)
    assert link.offers == [5]
    engine.steps += 1
    saving = asyncio.create_task(save_ahead(engine, link, memory_outlives_worker=False))
    for _ in range(60):
        await asyncio.sleep(0)
    saving.cancel()
    assert link.offers == [5, 5]
