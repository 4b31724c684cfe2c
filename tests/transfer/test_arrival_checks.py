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
    checks = ArrivalChecks(blocks, executor)
    for index in range(num_blocks if is_told else 0):
        checks.arrived(index)
    assert await checks.finish() == [block_checksum(block) for block in blocks]
    assert checks.seconds > 0


async def test_a_block_in_host_memory_is_checked_by_the_thread_that_brought_it(executor, monkeypatch):
    by = []

    def note(block):
        by.append(threading.current_thread())
        return block_checksum(block)

    monkeypatch.setattr("shared.transfer.arrival_checks.block_checksum", note)
    checks = ArrivalChecks(random_blocks(8, MIB), executor)
    for index in range(8):
        checks.arrived(index)
    assert by == [threading.current_thread()] * 8
    await checks.finish()


async def test_a_check_that_was_cancelled_reads_nothing_any_more(executor, monkeypatch):
    reading, go_on = threading.Event(), threading.Event()

    def slow(block):
        reading.set()
        go_on.wait(10)
        return block_checksum(block)

    monkeypatch.setattr("shared.transfer.checksum.block_checksum", slow)
    finishing = asyncio.create_task(ArrivalChecks(random_blocks(8, MIB), executor).finish())
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
        await ArrivalChecks(random_blocks(8, MIB), executor).finish()
