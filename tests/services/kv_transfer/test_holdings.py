"""Whose arena it is, and when nobody writes it any more."""

import asyncio
from types import SimpleNamespace

import pytest

from services.kv_transfer.holdings import Holdings


class NoTiers:
    async def adopt(self, fingerprint, block_bytes):
        pass


def attachment():
    return SimpleNamespace(
        destinations=set(),
        ended=asyncio.Event(),
        fingerprint="model",
        block_bytes=1,
        table=SimpleNamespace(sealed=list),
        shared_arena=None,
    )


@pytest.fixture
def holdings():
    return Holdings(NoTiers())


async def test_another_attachment_takes_the_place_of_the_first(holdings):
    first, second = attachment(), attachment()
    await holdings.attach(first)
    await holdings.attach(second)
    assert first.ended.is_set()
    assert not holdings.detach(first)
    assert holdings.attachment is second


async def test_an_arena_is_quiet_only_when_the_pulls_of_earlier_attachments_have_ended_too(holdings):
    """A worker that attached once more, and died, while a pull of its first connection had not ended."""
    first, second = attachment(), attachment()
    await holdings.attach(first)
    first.destinations |= {3}
    await holdings.attach(second)
    assert holdings.detach(second)
    ending = asyncio.create_task(holdings.end_orphan())
    await asyncio.sleep(0.05)
    assert not ending.done()
    first.destinations -= {3}
    assert await ending
