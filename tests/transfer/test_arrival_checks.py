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


@pytest.fixture
def on_device(monkeypatch):
    """Blocks count as blocks in device memory."""
    monkeypatch.setattr("shared.transfer.arrival_checks.DeviceBlock", np.ndarray)


def random_blocks(num_blocks, block_bytes):
    return list(np.random.default_rng(3).integers(0, 256, (num_blocks, block_bytes), dtype=np.uint8))


async def check_all(executor, num_blocks, block_bytes):
    blocks = random_blocks(num_blocks, block_bytes)
    checks = ArrivalChecks(blocks, executor)
    for index in range(num_blocks):
        checks.arrived(index)
        if index % 7 == 3:
            await asyncio.sleep(0.002)
    assert await checks.finish() == [block_checksum(block) for block in blocks]
    assert checks.seconds > 0


SIZES = pytest.mark.parametrize(("num_blocks", "block_bytes"), [(1, 1), (5, 64 << 10), (3, 5 * MIB), (40, 512 << 10)])


@SIZES
async def test_every_block_is_checked_once_whenever_it_arrives(executor, num_blocks, block_bytes):
    await check_all(executor, num_blocks, block_bytes)


@SIZES
async def test_every_block_on_a_device_is_checked_once(executor, on_device, num_blocks, block_bytes):
    await check_all(executor, num_blocks, block_bytes)


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


async def test_blocks_are_checked_while_others_have_yet_to_arrive(executor, on_device, monkeypatch):
    checked = threading.Event()

    def note(block):
        checked.set()
        return block_checksum(block)

    monkeypatch.setattr("shared.transfer.arrival_checks.block_checksum", note)
    blocks = random_blocks(16, MIB)
    checks = ArrivalChecks(blocks, executor)
    checks.arrived(0)
    await asyncio.sleep(0.02)
    assert not checked.is_set()  # too little to wake a thread for
    checks.arrived(9)
    assert await asyncio.to_thread(checked.wait, 10)
    for index in range(10, 16):
        checks.arrived(index)
    assert await checks.finish() == [block_checksum(block) for block in blocks]


async def test_once_settled_nothing_reads_the_blocks(executor, on_device, monkeypatch):
    reading, go_on = threading.Event(), threading.Event()

    def slow(block):
        reading.set()
        go_on.wait(10)
        return block_checksum(block)

    monkeypatch.setattr("shared.transfer.arrival_checks.block_checksum", slow)
    checks = ArrivalChecks(random_blocks(8, MIB), executor)
    checks.arrived(4)
    assert await asyncio.to_thread(reading.wait, 10)
    settling = asyncio.create_task(checks.settled())
    await asyncio.sleep(0.02)
    settling.cancel()
    await asyncio.sleep(0.02)
    assert not settling.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await settling


async def test_a_checksum_that_cannot_be_taken_is_an_error_and_not_a_hang(executor, on_device, monkeypatch):
    def broken(block):
        raise ZeroDivisionError

    monkeypatch.setattr("shared.transfer.arrival_checks.block_checksum", broken)
    checks = ArrivalChecks(random_blocks(8, MIB), executor)
    checks.arrived(5)
    checks.arrived(7)
    with pytest.raises(ZeroDivisionError):
        await checks.finish()


async def test_an_executor_that_is_shut_down_does_not_harm_the_transports_thread(executor, on_device):
    executor.shutdown()
    ArrivalChecks(random_blocks(8, MIB), executor).arrived(7)
