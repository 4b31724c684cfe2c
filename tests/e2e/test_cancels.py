"""A cancel runs down one chain, gateway, decode, prefill, whatever the session was doing; every block comes back."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid

import httpx
import pytest

from loadtest.cancel_bench import run_cancels
from loadtest.fleet import Fleet, blocks_in_use
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from shared.rpc import open_channel

NUM_WORKERS = 3
BODY = {"model": "pydoc-mini", "max_tokens": 2000, "ignore_eos": True, "temperature": 1, "stream": True}
SENTENCE = "The report was read twice and filed. "
BACK_TO_NORMAL_S = 2.0


def worker_of(suite, role: str) -> dict:
    return next(worker for worker in suite.status()["workers"] if worker["role"] == role)


async def until_decode_is_free(fleet: Fleet, timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while any(blocks_in_use(status) or status.waiting_for_kv for status in await fleet.statuses("decode")):
            await asyncio.sleep(0.01)


async def test_session_whose_client_leaves_while_it_waits_for_a_hung_prefill_worker_holds_nothing(suite):
    async with Fleet(suite.redis_url) as fleet:
        await fleet.until_ready(NUM_WORKERS)
        name = worker_of(suite, "prefill")["worker_id"]
        pid = next(process["pid"] for process in suite.status()["processes"] if process["name"] == name)
        os.kill(pid, signal.SIGSTOP)
        try:
            body = {**BODY, "prompt": SENTENCE * 40, "cache_salt": uuid.uuid4().hex}
            async with httpx.AsyncClient(timeout=30) as client:
                request = asyncio.create_task(client.post(f"{suite.url}/v1/completions", json=body))
                async with asyncio.timeout(30):
                    while not any(status.waiting_for_kv for status in await fleet.statuses("decode")):
                        await asyncio.sleep(0.01)
                request.cancel()
                await asyncio.gather(request, return_exceptions=True)
            await until_decode_is_free(fleet)
        finally:
            os.kill(pid, signal.SIGCONT)
        await fleet.until_ready(NUM_WORKERS)
        await fleet.until_free()


@pytest.mark.parametrize("n", [1, 4])
async def test_client_that_leaves_while_its_choices_are_decoded_frees_all_of_them_everywhere(suite, n):
    async with Fleet(suite.redis_url) as fleet:
        await fleet.until_ready(NUM_WORKERS)
        body = {**BODY, "prompt": SENTENCE * 20, "n": n, "cache_salt": uuid.uuid4().hex}
        async with (
            httpx.AsyncClient(timeout=60) as client,
            client.stream("POST", f"{suite.url}/v1/completions", json=body) as stream,
        ):
            async for line in stream.aiter_lines():
                if line.startswith("data: {"):
                    break
            assert (await fleet.running_decode_worker()).running == n
        await fleet.until_free()
        assert not any(status.running or status.waiting for status in await fleet.statuses())


async def test_prefill_stops_soon_after_its_call_was_cancelled(suite):
    """What was computed stays in the cache: the same call made again says how far the first one got."""
    worker = worker_of(suite, "prefill")
    tokens = [(29 * i + 3) % 1500 + 300 for i in range(3200)]
    request = pb.PrefillRequest(
        incarnation=worker["incarnation"], fingerprint=worker["fingerprint"], token_ids=tokens, num_blocks=200
    )
    async with Fleet(suite.redis_url) as fleet, open_channel(worker["address"]) as channel:
        stub = rpc.WorkerStub(channel)
        for attempt in range(5):  # on a busy machine a cancel may come too late
            request.session_id, request.cache_salt = f"cut-{attempt}", uuid.uuid4().hex
            cut = stub.Prefill(request)
            await cut.read()
            cut.cancel()
            await fleet.until_free()
            request.session_id = f"again-{attempt}"
            again = stub.Prefill(request)
            computed = (await again.read()).cached_blocks
            again.cancel()
            if computed < 200:
                break
        assert computed < 200
        await fleet.until_free()


async def test_after_a_storm_of_cancels_requests_are_served_as_before(suite):
    async with Fleet(suite.redis_url) as fleet:
        await fleet.until_ready(NUM_WORKERS)
        await run_cancels(suite.url, fleet, cancels=64, sessions=16, window_s=0.2, seed=11)
        started_s = time.perf_counter()
        body = {**BODY, "prompt": SENTENCE, "max_tokens": 8, "stream": False}
        async with httpx.AsyncClient(timeout=60) as client:
            replies = await asyncio.gather(*(client.post(f"{suite.url}/v1/completions", json=body) for _ in range(8)))
        assert {reply.status_code for reply in replies} == {200}
        assert {reply.json()["usage"]["completion_tokens"] for reply in replies} == {8}
        assert time.perf_counter() - started_s < 10 * BACK_TO_NORMAL_S  # the bound, on a machine that does much else
        await fleet.until_free()
