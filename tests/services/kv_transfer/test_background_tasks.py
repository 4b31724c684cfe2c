"""A kv_transfer whose housekeeping ended by a defect ends too, instead of seeming well."""

import asyncio

import pytest

from services.kv_transfer.service import stopped_or_failed


async def for_ever():
    await asyncio.Event().wait()


async def fail():
    raise ZeroDivisionError


async def test_a_task_that_fails_ends_the_process_by_its_error():
    tasks = [asyncio.create_task(for_ever()), asyncio.create_task(fail())]
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(stopped_or_failed(tasks, asyncio.Event()), 10)
    tasks[0].cancel()


async def test_a_stop_is_no_failure():
    task, stop = asyncio.create_task(for_ever()), asyncio.Event()
    stop.set()
    await asyncio.wait_for(stopped_or_failed([task], stop), 10)
    assert not task.done()
    task.cancel()
