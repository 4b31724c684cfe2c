"""Work ends with its client, with whoever waits for it, or by itself; and says which."""

from __future__ import annotations

import asyncio

import pytest

from services.gateway.disconnect import unless_disconnected
from services.gateway.http_protocol import GONE
from shared.errors import Cancelled, InvalidRequest


def client() -> tuple[asyncio.Future[None], dict[str, object]]:
    """Leaves with the result of the future; and the scope of its request."""
    gone = asyncio.get_running_loop().create_future()
    return gone, {GONE: gone}


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


@pytest.mark.parametrize("turns", [0, 1], ids=["at once", "a turn later"])
async def test_client_that_leaves_when_the_work_has_ended_ends_nothing_else(turns):
    (gone, scope), work = client(), Work()

    async def serve():
        result = await unless_disconnected(scope, work.run())
        await asyncio.sleep(0.01)
        return result

    serving = asyncio.create_task(serve())
    await asyncio.sleep(0)
    work.outcome.set_result(7)
    for _ in range(turns):
        await asyncio.sleep(0)
    gone.set_result(None)
    assert await serving == 7
    assert not work.was_ended


async def test_error_of_work_is_raised():
    (_, scope), work = client(), Work()
    work.outcome.set_exception(InvalidRequest("no"))
    with pytest.raises(InvalidRequest):
        await unless_disconnected(scope, work.run())


async def test_work_has_ended_when_its_client_has_left():
    (gone, scope), work = client(), Work()
    waiting = asyncio.create_task(unless_disconnected(scope, work.run()))
    await asyncio.sleep(0.01)
    gone.set_result(None)
    with pytest.raises(Cancelled):
        await waiting
    assert work.was_ended
    assert not waiting.cancelled()


async def test_work_has_ended_when_its_waiter_was_cancelled():
    (_, scope), work = client(), Work()
    waiting = asyncio.create_task(unless_disconnected(scope, work.run()))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert work.was_ended
    assert waiting.cancelled()


async def test_client_that_left_before_is_noticed():
    (gone, scope), work = client(), Work()
    gone.set_result(None)
    with pytest.raises(Cancelled):
        await unless_disconnected(scope, work.run())
    assert work.was_ended
