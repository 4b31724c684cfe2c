"""Checksums beside the transfer: of what arrived, of nothing twice, and of nothing that may still change."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from shared.transfer.arrival_checks import ArrivalChecks
from shared.transfer.checksum import block_checksum

pytestmark = pytest.mark.timeout(30)

MIB = 1 << 20


@pytest.fixture
def executor():
    with ThreadPoolExecutor(2) as executor:
        yield executor


def random_blocks(num_blocks, block_bytes):
    return list(np.random.default_rng(3).integers(0, 256, (num_blocks, block_bytes), dtype=np.uint8))


@pytest.mark.parametrize("is_told", [True, False])
@pytest.mark.parametrize(("num_blocks", "block_bytes"), [(1, 1), (5, 64 << 10), (3, 5 * MIB), (40, 512 << 10)])
async def test_every_block_is_checked_once_whether_its_arrival_was_told_or_not(
    executor, num_blocks, block_bytes, is_told
):
    blocks = random_blocks(num_blocks, block_bytes)
    checks = ArrivalChecks(blocks, executor, hands_over=lambda: True)
    for index in range(num_blocks if is_told else 0):
        checks.arrived(index)
    assert await checks.finish() == [block_checksum(block) for block in blocks]
    assert checks.seconds > 0


@pytest.fixture
def checked_by(monkeypatch):
    """Threads that took checksums, in that order."""
    threads = []

    def note(block):
        threads.append(threading.current_thread())
        return block_checksum(block)

    monkeypatch.setattr("shared.transfer.arrival_checks.block_checksum", note)
    return threads


async def test_a_thread_beside_checks_a_block_while_the_next_one_is_brought(executor, checked_by):
    checks = ArrivalChecks(random_blocks(3, MIB), executor, hands_over=lambda: True)
    for index in range(3):
        checks.arrived(index)
        while len(checked_by) <= index:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)  # until it is done with it
    await checks.finish()
    here = threading.current_thread()
    assert [thread is here for thread in checked_by] == [False, False, True]  # nothing is brought beside the last one


async def test_who_brings_blocks_checks_them_while_the_threads_beside_have_other_things_to_do(executor, checked_by):
    go_on = threading.Event()
    for _ in range(2):
        executor.submit(go_on.wait, 10)
    checks = ArrivalChecks(random_blocks(8, MIB), executor, hands_over=lambda: True)
    for index in range(8):
        checks.arrived(index)
    assert checked_by == [threading.current_thread()] * 6  # two wait
    go_on.set()
    assert len(await checks.finish()) == 8


@pytest.mark.parametrize(("block_bytes", "hands_over"), [(MIB - 1, True), (MIB, False)])
async def test_who_brings_blocks_checks_them_where_they_are_small_or_no_core_is_free(
    executor, checked_by, block_bytes, hands_over
):
    checks = ArrivalChecks(random_blocks(8, block_bytes), executor, hands_over=lambda: hands_over)
    for index in range(8):
        checks.arrived(index)
    assert checked_by == [threading.current_thread()] * 8
    await checks.finish()


async def test_a_transfer_that_broke_off_is_not_read_after_its_checks_have_stopped(executor, monkeypatch):
    reading, go_on, ended = threading.Event(), threading.Event(), []

    def slow(block):
        reading.set()
        go_on.wait(10)
        ended.append(True)
        return 0

    monkeypatch.setattr("shared.transfer.arrival_checks.block_checksum", slow)
    checks = ArrivalChecks(random_blocks(8, MIB), executor, hands_over=lambda: True)
    checks.arrived(0)
    assert await asyncio.to_thread(reading.wait, 10)
    stopping = asyncio.create_task(checks.stop())
    await asyncio.sleep(0.01)
    assert not stopping.done()
    go_on.set()
    await stopping
    assert ended == [True]


async def test_a_check_that_was_cancelled_reads_nothing_any_more(executor, monkeypatch):
    reading, go_on = threading.Event(), threading.Event()

    def slow(block):
        reading.set()
        go_on.wait(10)
        return block_checksum(block)

    monkeypatch.setattr("shared.transfer.checksum.block_checksum", slow)
    finishing = asyncio.create_task(ArrivalChecks(random_blocks(8, MIB), executor, hands_over=lambda: True).finish())
    assert await asyncio.to_thread(reading.wait, 10)
    finishing.cancel()
    await asyncio.sleep(0.02)
    assert not finishing.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await finishing


async def test_a_checksum_that_cannot_be_taken_is_an_error_and_not_a_hang(executor, monkeypatch):
    def broken(block):
        raise ZeroDivisionError

    monkeypatch.setattr("shared.transfer.checksum.block_checksum", broken)
    with pytest.raises(ZeroDivisionError):
        await ArrivalChecks(random_blocks(8, MIB), executor, hands_over=lambda: True).finish()
