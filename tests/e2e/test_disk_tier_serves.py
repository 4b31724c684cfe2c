"""KV that went through host memory to disk and back gives the same tokens as KV that never left, restarts included."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid

import pytest

from protos import worker_pb2 as pb

PROMPT = [(43 * i + 5) % 1500 + 300 for i in range(400)]
BLOCKS = 24

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def small(start_another):
    """An arena of about 1,300 tokens, host memory for a few hundred, and a disk."""
    sizes = ("--kv-cache-bytes", "8MiB", "--tier-bytes", "4MiB", "--disk-bytes", "256MiB")
    return start_another("--prefill", "0", "--decode", "1", "--threads", "1", *sizes)


def the_worker(suite) -> dict:
    return suite.status()["workers"][0]


def own_hint(worker: dict) -> list[pb.HolderHint]:
    holder = pb.PeerRef(worker_id=worker["worker_id"], incarnation=worker["transfer"]["incarnation"])
    return [pb.HolderHint(holder=holder, num_blocks=BLOCKS)]


async def push_out(suite, generate, worker) -> None:
    """Other prompts, until nothing of the first is left in the arena or in host memory.

    In small steps: blocks are saved ahead of their eviction, and what a rush of prompts outruns is lost, as it may be.
    """
    for round_ in range(9):
        other = [(13 * i + 101 * round_) % 1500 + 300 for i in range(340)]
        await generate(worker, other, cache_salt=uuid.uuid4().hex, max_tokens=1)
        await asyncio.sleep(0.3)


async def from_disk(suite, generate, worker, salt: str):
    """Asks until something came from the tiers: what a rush outran was computed anew, and is pushed out once more."""
    deadline = time.monotonic() + 60
    while True:
        reply = await generate(worker, PROMPT, cache_salt=salt, holders=own_hint(worker))
        if reply.finish.timeline.fetched_blocks or time.monotonic() > deadline:
            return reply
        await push_out(suite, generate, worker)


async def test_kv_from_disk_equals_recompute_before_and_after_kv_transfer_was_killed(small, generate):
    worker, salt = the_worker(small), uuid.uuid4().hex
    before = await generate(worker, PROMPT, cache_salt=salt)
    await push_out(small, generate, worker)
    again = await from_disk(small, generate, worker, salt)
    assert again.token_ids == before.token_ids
    assert again.finish.timeline.fetched_blocks > 0
    await push_out(small, generate, worker)
    pid = next(p["pid"] for p in small.status()["processes"] if p["name"] == "decode-0.transfer")
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    old = worker["transfer"]["incarnation"]
    while not (now := the_worker(small))["transfer"] or now["transfer"]["incarnation"] == old or not now["ready"]:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    after = await from_disk(small, generate, now, salt)
    assert after.token_ids == before.token_ids
    assert after.finish.timeline.fetched_blocks > 0
    small.wait_for_baseline()


async def test_an_edited_history_shares_what_comes_before_the_edit_and_nothing_after(small, generate):
    worker, salt = the_worker(small), uuid.uuid4().hex
    await generate(worker, PROMPT, cache_salt=salt)
    edited = PROMPT.copy()
    edited[165] += 1  # in block 10
    reply = await generate(worker, edited, cache_salt=salt)
    assert reply.finish.cached_tokens == 160
    assert reply.token_ids == (await generate(worker, edited, cache_salt=uuid.uuid4().hex)).token_ids
