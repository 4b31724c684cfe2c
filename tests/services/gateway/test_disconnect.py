"""Work ends with its client, with whoever waits for it, or by itself; and says which."""

from __future__ import annotations

import asyncio

import pytest

from services.gateway.disconnect import unless_disconnected
from shared.errors import Cancelled, InvalidRequest


class Client:
    """Leaves when told to."""

    def __init__(self):
        self.left = asyncio.Event()
        self.listeners = 0

    async def receive(self):
        self.listeners += 1
        try:
            await self.left.wait()
        finally:
            self.listeners -= 1
        return {"type": "http.disconnect"}


class Work:
    """Goes on until it is told the outcome; notes whether it was ended."""

    def __init__(self):
        self.outcome = asyncio.get_running_loop().create_future()
        self.was_ended = False

    async def run(self):
        try:
            return await self.outcome
        except asyncio.CancelledError:
            self.was_ended = True
            raise


async def test_result_of_work_is_returned_and_nobody_listens_any_more():
    client, work = Client(), Work()
    waiting = asyncio.create_task(unless_disconnected(client.receive, work.run()))
    await asyncio.sleep(0)
    work.outcome.set_result(7)
    assert await waiting == 7
    await asyncio.sleep(0)
    assert client.listeners == 0
    assert not work.was_ended


async def test_error_of_work_is_raised():
    client, work = Client(), Work()
    work.outcome.set_exception(InvalidRequest("no"))
    with pytest.raises(InvalidRequest):
        await unless_disconnected(client.receive, work.run())


async def test_work_has_ended_when_its_client_has_left():
    client, work = Client(), Work()
    waiting = asyncio.create_task(unless_disconnected(client.receive, work.run()))
    await asyncio.sleep(0.01)
    client.left.set()
    with pytest.raises(Cancelled):
        await waiting
    assert work.was_ended
    assert not waiting.cancelled()


async def test_work_has_ended_when_its_waiter_was_cancelled():
    client, work = Client(), Work()
    waiting = asyncio.create_task(unless_disconnected(client.receive, work.run()))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert work.was_ended
    assert waiting.cancelled()
    await asyncio.sleep(0)
    assert client.listeners == 0


async def test_result_that_came_with_the_clients_leaving_counts():
    client, work = Client(), Work()
    waiting = asyncio.create_task(unless_disconnected(client.receive, work.run()))
    await asyncio.sleep(0.01)
    work.outcome.set_result(7)
    client.left.set()
    assert await waiting == 7
