"""Waiting for what a directory comes to know."""

import asyncio
import time


async def until(condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


async def until_found(directory, hashes, expected, timeout_s=8.0):
    """A lookup that a busy machine delays past its time-out finds nothing, by design: the next one does."""
    deadline = time.monotonic() + timeout_s
    while (found := await directory.longest_prefixes(hashes)) != expected:
        assert time.monotonic() < deadline, f"found {found}, not {expected}"
        await asyncio.sleep(0.05)
