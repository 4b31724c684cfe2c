"""Limits per minute hold for simultaneous requests too, and headers tell what is counted."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from redis.asyncio import Redis

from services.gateway.access.admission import Admission
from services.gateway.access.caller import Caller
from services.gateway.access.counters import Amount, MemoryCounters, RedisCounters
from services.gateway.access.rate_limits import REQUESTS, TOKENS, RateLimits
from shared.access.api_keys import mint
from shared.access.key_store import FileKeys
from shared.errors import RateLimited
from tests.services.gateway.conftest import Script
from tests.services.gateway.test_gateway_errors import assert_openai_error

WINDOW_S = 60.0


@pytest.fixture(params=["memory", "redis"])
async def counters(request, monkeypatch):
    monkeypatch.setattr("services.gateway.access.counters.TIMEOUT_S", 10.0)  # a busy machine is no Redis that hangs
    if request.param == "memory":
        yield MemoryCounters()
        return
    shared = RedisCounters(request.getfixturevalue("fresh_redis_url"))
    yield shared
    await shared.close()


async def counted(counters, *amount, **options):
    """The one count of an amount."""
    [count] = await counters.count(Amount(*amount, **options))
    return count


async def test_simultaneous_counts_never_go_beyond_the_limit(counters):
    counts = await asyncio.gather(*(counted(counters, "a", 3, WINDOW_S, limit=10) for _ in range(20)))
    assert sum(count.fits for count in counts) == 3
    assert max(count.used for count in counts) == 9
    assert (await counted(counters, "a", 1, WINDOW_S, limit=10)).used == 10  # a smaller one still fits
    assert not (await counted(counters, "a", 1, WINDOW_S, limit=10)).fits
    assert (await counted(counters, "b", 1, WINDOW_S, limit=10)).used == 1


async def test_amounts_are_counted_together_or_not_at_all(counters):
    both = Amount("{t}a", 1, WINDOW_S, limit=2), Amount("{t}b", 1, WINDOW_S, limit=1)
    assert [(count.fits, count.used) for count in await counters.count(*both)] == [(True, 1), (True, 1)]
    assert [(count.fits, count.used) for count in await counters.count(*both)] == [(True, 1), (False, 1)]


async def test_a_request_costs_one_step_before_it_is_let_in_and_counts_only_while_there_are_tokens(fresh_redis_url):
    limits = RateLimits(fresh_redis_url)
    _, key = mint("acme", requests_per_minute=5, tokens_per_minute=10)
    async with Redis.from_url(fresh_redis_url) as redis:
        await limits.take_request(key)
        before = (await redis.info("commandstats"))["cmdstat_eval"]["calls"]
        taken = await limits.take_request(key)
        assert (await redis.info("commandstats"))["cmdstat_eval"]["calls"] == before + 1
    assert {one.standing.kind: (one.is_granted, one.standing.remaining) for one in taken} == {
        TOKENS: (True, 10),
        REQUESTS: (True, 3),
    }
    await limits.take(key, TOKENS, 10)
    assert [(one.is_granted, one.standing.remaining) for one in await limits.take_request(key)] == [
        (False, 0),
        (True, 3),
    ]
    await limits.close()


async def test_looking_begins_no_window(counters):
    looked = await counted(counters, "a", 0, WINDOW_S)
    assert (looked.fits, looked.used, looked.left_s, looked.window) == (True, 0, WINDOW_S, "")
    begun = await counted(counters, "a", 1, WINDOW_S)
    assert begun.window
    assert 0 < begun.left_s <= WINDOW_S
    assert (await counted(counters, "a", 0, WINDOW_S)).window == begun.window


async def test_what_is_given_back_goes_to_its_own_window(counters):
    window = (await counted(counters, "a", 5, WINDOW_S)).window
    assert (await counted(counters, "a", -2, WINDOW_S, window=window)).used == 3
    late = await counted(counters, "a", -2, WINDOW_S, window="an earlier one")
    assert (late.fits, late.used) == (False, 3)
    assert (await counted(counters, "a", 9, WINDOW_S)).used == 12  # without a limit, beyond any


async def test_a_window_ends(counters):
    assert (await counted(counters, "a", 5, 0.05)).used == 5
    async with asyncio.timeout(30):
        while (await counted(counters, "a", 0, 0.05)).used:
            await asyncio.sleep(0.01)


@pytest.fixture(params=["memory", "redis"])
async def limits(request):
    made = RateLimits(request.getfixturevalue("fresh_redis_url") if request.param == "redis" else "")
    yield made
    await made.close()


async def test_tokens_are_reserved_and_settled(limits):
    _, key = mint("acme", tokens_per_minute=100)
    taken = await limits.take(key, TOKENS, 60)
    assert (taken.is_granted, taken.standing.remaining) == (True, 40)
    refused = await limits.take(key, TOKENS, 41)
    assert (refused.is_granted, refused.standing.remaining) == (False, 40)
    await limits.settle(key, taken, 10)
    assert (await limits.take(key, TOKENS, 0)).standing.remaining == 90
    await limits.settle(key, await limits.take(key, TOKENS, 10), 120)  # more than was asked for: the next one pays
    assert (await limits.take(key, TOKENS, 0)).standing.remaining == -30


@pytest.fixture
def guarded(start_gateway, tmp_path):
    """`await guarded(options)`: starts a gateway whose only key has these options; gives it and the key's headers."""

    async def start(stack, **options):
        key, record = mint("acme", **options)
        await FileKeys(tmp_path / "keys.json").put(record)
        running = await stack.enter_async_context(start_gateway(api_keys=str(tmp_path / "keys.json")))
        return running, {"authorization": f"Bearer {key}"}

    return start


@pytest.fixture
async def stack():
    async with contextlib.AsyncExitStack() as opened:
        yield opened


async def test_of_simultaneous_requests_so_many_are_served_as_are_allowed(guarded, stack):
    running, headers = await guarded(stack, requests_per_minute=5)
    body = {"model": "pydoc-mini", "prompt": "hi", "max_tokens": 2}
    replies = await asyncio.gather(
        *(running.http.post("/v1/completions", json=body, headers=headers) for _ in range(16))
    )
    served = [reply for reply in replies if reply.status_code == 200]
    assert len(served) == 5
    assert {reply.headers["x-ratelimit-remaining-requests"] for reply in served} == {"4", "3", "2", "1", "0"}
    for reply in set(replies) - set(served):
        assert_openai_error(reply, 429, "rate_limit_exceeded")
        assert reply.headers["x-ratelimit-remaining-requests"] == "0"


async def test_simultaneous_requests_share_a_minutes_tokens_and_give_back_what_they_did_not_use(guarded, stack):
    running, headers = await guarded(stack, tokens_per_minute=100)
    running.worker.script.hold = True
    body = {"model": "pydoc-mini", "prompt": [5] * 10, "max_tokens": 20}
    asked = [asyncio.create_task(running.http.post("/v1/completions", json=body, headers=headers)) for _ in range(8)]
    await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
    async with asyncio.timeout(20):
        while sum(task.done() for task in asked) < 5:
            await asyncio.sleep(0.01)
    refused = [task.result() for task in asked if task.done()]
    await running.worker.wait_for(lambda: len(running.worker.submits) == 3)
    for reply in refused:
        message = assert_openai_error(reply, 429, "rate_limit_exceeded")["message"]
        assert "10 tokens" in message
        assert "up to 20" in message
        assert reply.headers["x-ratelimit-remaining-tokens"] == "10"
        assert 1 <= int(reply.headers["retry-after"]) <= 60
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    running.worker.script.hold = False
    async with asyncio.timeout(20):  # they ended without output: 3 prompts are left counted
        while (await running.http.post("/v1/completions", json=body, headers=headers)).status_code != 200:
            await asyncio.sleep(0.01)


async def test_chats_without_a_limit_start_with_their_prompts_and_pay_for_what_they_said(guarded, stack):
    running, headers = await guarded(stack, tokens_per_minute=60)
    running.worker.script = Script(token_ids=[300] * 49)
    body = {"model": "pydoc-mini", "messages": [{"role": "user", "content": "hi"}]}
    first = await running.http.post("/v1/chat/completions", json=body, headers=headers)
    usage = first.json()["usage"]
    assert first.headers["x-ratelimit-remaining-tokens"] == str(60 - usage["prompt_tokens"])
    assert usage["total_tokens"] > 50
    async with asyncio.timeout(20):  # it is settled beside the reply
        while (second := await running.http.post("/v1/chat/completions", json=body, headers=headers)).is_success:
            await asyncio.sleep(0.01)
    assert_openai_error(second, 429, "rate_limit_exceeded")


async def test_headers_tell_what_the_request_itself_reserved(guarded, stack):
    running, headers = await guarded(stack, tokens_per_minute=1000, requests_per_minute=10)
    body = {"model": "pydoc-mini", "prompt": [5] * 10, "max_tokens": 20, "n": 2}
    reply = await running.http.post("/v1/completions", json=body, headers=headers)
    assert reply.headers["x-ratelimit-limit-tokens"] == "1000"
    assert reply.headers["x-ratelimit-remaining-tokens"] == "950"
    assert reply.headers["x-ratelimit-remaining-requests"] == "9"


async def test_bounds_on_what_is_under_way_hold_while_tokens_are_counted(fresh_redis_url):
    _, key = mint("acme", tokens_per_minute=1000, max_concurrent=2)
    admission = Admission(RateLimits(fresh_redis_url), max_concurrent=100, max_tenant_concurrent=0)
    entered = await asyncio.gather(
        *(admission.enter(Caller("acme", key), "m", 1) for _ in range(10)), return_exceptions=True
    )
    assert sum(isinstance(outcome, RateLimited) for outcome in entered) == 8
    await admission.close()
