"""After errors, disconnects and aborts every worker's blocks are free again."""

from __future__ import annotations

import asyncio
import random

import httpx

from loadtest.cancel_bench import run_cancels
from loadtest.fleet import Fleet
from loadtest.streams import run_streams
from loadtest.workload import draw

BODY = {
    "model": "pydoc-mini",
    "messages": [{"role": "user", "content": "What does json.dumps do? " * 30}],
    "max_tokens": 400,
    "ignore_eos": True,
    "temperature": 0,
    "stream": True,
}


async def test_disconnects_at_random_instants_free_every_block(suite):
    async with Fleet(suite.redis_url) as fleet:
        outcome = await run_cancels(suite.url, fleet, cancels=96, sessions=8, window_s=0.3, seed=5)
        print(outcome.summary())
        assert outcome.stages.keys() >= {"streaming", "sent"}


def test_refused_requests_hold_nothing(suite):
    for bad in ({"max_tokens": 10**7}, {"messages": []}, {"n": 0}, {"temperature": -1}, {"nonsense": 1}):
        reply = httpx.post(f"{suite.url}/v1/chat/completions", json={**BODY, **bad})
        assert reply.status_code == 400, bad
        assert reply.json()["error"]["message"]
    suite.wait_for_baseline()


def test_slots_are_used_well_under_load(suite):
    """PagedAttention's own figure: at least 96 % of the allocated token slots hold tokens, under locust's workload."""
    used_before, allocated_before = decode_slots(suite)
    rng = random.Random(11)
    asyncio.run(run_streams(suite.url, [draw(rng) for _ in range(48)], 24))
    used, allocated = decode_slots(suite)
    assert (used - used_before) / (allocated - allocated_before) >= 0.96


def decode_slots(suite) -> tuple[int, int]:
    workers = [worker for worker in suite.status()["workers"] if worker["role"] == "decode"]
    return sum(worker["used_slots"] for worker in workers), sum(worker["allocated_slots"] for worker in workers)
