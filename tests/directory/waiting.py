"""Waiting for what a directory comes to know."""

import asyncio
import time

from shared.directory.store import RedisStore


async def until(condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


async def assert_cancelled_at_any_turn(url):
    """Of the event loop, from the first connection on: whoever cancels a task may wait for it to end."""
    for num_turns in range(100):
        store = RedisStore(url, lookup_timeout_s=5.0, background_timeout_s=5.0)
        question = asyncio.create_task(store.run([("PING",), ("GET", "a")]))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        if question.cancel():
            await asyncio.wait([question], timeout=20)
            assert question.cancelled(), f"after {num_turns} turns"
        await store.close()


async def until_found(directory, hashes, expected, timeout_s=8.0):
    """A lookup that a busy machine delays past its time-out finds nothing, by design: the next one does."""
    deadline = time.monotonic() + timeout_s
    while (found := await directory.longest_prefixes(hashes)) != expected:
        assert time.monotonic() < deadline, f"found {found}, not {expected}"
        await asyncio.sleep(0.05)
