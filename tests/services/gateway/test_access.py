"""Keys, limits and bounds: who may call, how much, and what they are told otherwise."""

from __future__ import annotations

import asyncio
import time

import pytest

from services.gateway.settings import GatewaySettings
from shared.access.api_keys import key_id_of, mint
from shared.access.key_store import FileKeys, RedisKeys
from shared.errors import ConfigurationError, InvalidRequest
from tests.services.gateway.test_gateway_errors import assert_openai_error

BODY = {"model": "pydoc-mini", "prompt": "hi", "max_tokens": 4}


def bearer(key):
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def keys(tmp_path):
    return FileKeys(tmp_path / "keys.json")


@pytest.fixture
def guarded(start_gateway, keys, tmp_path):
    """A gateway with one key of these options; yields (running, key)."""
    import contextlib

    @contextlib.asynccontextmanager
    async def start(options=None, **settings):
        key, record = mint("acme", **(options or {}))
        await keys.put(record)
        async with start_gateway(api_keys=str(tmp_path / "keys.json"), **settings) as running:
            yield running, key

    return start


async def test_without_a_valid_key_nothing_is_served_but_probes(guarded):
    async with guarded() as (running, key):
        for headers in ({}, bearer("tnd-nope"), bearer(key[:-1] + "_"), {"x-api-key": "none"}):
            reply = await running.http.post("/v1/completions", json=BODY, headers=headers)
            assert assert_openai_error(reply, 401, "invalid_api_key")["type"] == "authentication_error"
        assert (await running.http.get("/v1/models")).status_code == 401
        for path in ("/live", "/ready", "/version", "/metrics"):
            assert (await running.http.get(path)).status_code in (200, 503)  # a busy machine may not be ready
        assert not running.worker.submits


async def test_a_valid_key_works_in_both_headers(guarded):
    async with guarded() as (running, key):
        for headers in (bearer(key), {"x-api-key": key}):
            reply = await running.http.post("/v1/completions", json=BODY, headers=headers)
            assert reply.status_code == 200


@pytest.mark.parametrize("shape", [{}, {"anthropic-version": "2023-06-01"}])
async def test_models_are_those_that_the_key_allows(guarded, shape):
    async with guarded() as (running, key):
        headers = bearer(key) | shape
        listed = (await running.http.get("/v1/models", headers=headers)).json()["data"]
        assert [model["id"] for model in listed] == ["pydoc-mini"]
    async with guarded({"models": ["another"]}) as (running, key):
        headers = bearer(key) | shape
        assert (await running.http.get("/v1/models", headers=headers)).json()["data"] == []
        assert (await running.http.get("/v1/models/pydoc-mini", headers=headers)).status_code == 403


async def test_the_operators_own_key_works_without_a_store(start_gateway):
    async with start_gateway(api_key="sk-chosen") as running:
        assert (await running.http.post("/v1/completions", json=BODY)).status_code == 401
        reply = await running.http.post("/v1/completions", json=BODY, headers=bearer("sk-chosen"))
        assert reply.status_code == 200


async def test_a_key_is_not_to_be_found_in_what_is_kept_of_it(keys, tmp_path):
    key, record = mint("acme")
    await keys.put(record)
    text = (tmp_path / "keys.json").read_text()
    assert key not in text
    assert key.rsplit("-", 1)[1] not in text
    assert key_id_of(key) in text
    assert (tmp_path / "keys.json").stat().st_mode & 0o077 == 0


async def test_a_revoked_key_is_refused(guarded, keys):
    import msgspec

    async with guarded() as (running, key):
        [record] = (await keys.records()).values()
        await keys.put(msgspec.structs.replace(record, is_revoked=True))
        async with asyncio.timeout(30):
            while (await running.http.get("/v1/models", headers=bearer(key))).status_code != 401:
                await asyncio.sleep(0.2)


async def test_keys_in_redis_are_shared(fresh_redis_url, start_gateway):
    store = RedisKeys(fresh_redis_url)
    key, record = mint("acme")
    await store.put(record)
    await store.close()
    async with start_gateway(api_keys="redis") as running:
        assert (await running.http.get("/v1/models", headers=bearer(key))).status_code == 200
        assert (await running.http.get("/v1/models")).status_code == 401


async def test_models_that_a_key_does_not_allow_are_refused(guarded):
    async with guarded({"models": ("other",)}) as (running, key):
        reply = await running.http.post("/v1/completions", json=BODY, headers=bearer(key))
        assert_openai_error(reply, 403, "permission_denied")


async def test_requests_per_minute_are_limited_and_told(guarded):
    async with guarded({"requests_per_minute": 2}) as (running, key):
        replies = [await running.http.post("/v1/completions", json=BODY, headers=bearer(key)) for _ in range(3)]
        if replies[2].status_code == 200:  # a minute began between them
            replies = [await running.http.post("/v1/completions", json=BODY, headers=bearer(key)) for _ in range(3)]
        assert [reply.status_code for reply in replies] == [200, 200, 429]
        for reply, remaining in zip(replies, ("1", "0", "0"), strict=True):  # also the one that is refused is told
            assert reply.headers["x-ratelimit-limit-requests"] == "2"
            assert reply.headers["x-ratelimit-remaining-requests"] == remaining
            assert 1 <= int(reply.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
        assert "2 requests per minute" in assert_openai_error(replies[2], 429, "rate_limit_exceeded")["message"]
        assert 1 <= int(replies[2].headers["retry-after"]) <= 60


async def test_tokens_are_counted_as_they_really_were(guarded):
    async with guarded({"tokens_per_minute": 20}) as (running, key):
        too_long = await running.http.post("/v1/completions", json={**BODY, "prompt": [5] * 21}, headers=bearer(key))
        message = assert_openai_error(too_long, 429, "request_larger_than_rate_limit")["message"]
        assert "retry-after" not in too_long.headers  # it would be refused ever after
        assert "21 tokens" in message
        assert "20 tokens per minute" in message
        replies = []
        for _ in range(4):  # each costs 5 prompt tokens and 4 of output
            replies.append(
                await running.http.post("/v1/completions", json={**BODY, "prompt": [5] * 5}, headers=bearer(key))
            )
            await asyncio.sleep(0.1)
        assert 429 in [reply.status_code for reply in replies]
        assert replies[0].status_code == 200


async def test_requests_beyond_a_tenants_bound_are_refused_not_queued(guarded):
    async with guarded({"max_concurrent": 2}) as (running, key):
        running.worker.script.hold = True
        held = [
            asyncio.create_task(running.http.post("/v1/completions", json=BODY, headers=bearer(key))) for _ in range(2)
        ]
        await running.worker.wait_for(lambda: len(running.worker.submits) == 2)
        reply = await running.http.post("/v1/completions", json=BODY, headers=bearer(key))
        assert (
            "2 requests under way, the limit is 2" in assert_openai_error(reply, 429, "rate_limit_exceeded")["message"]
        )
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        running.worker.script.hold = False
        async with asyncio.timeout(30):  # what ended makes room again
            while (await running.http.post("/v1/completions", json=BODY, headers=bearer(key))).status_code != 200:
                await asyncio.sleep(0.05)


async def test_a_requests_own_deadline_ends_it(running):
    running.worker.script.hold = True
    started_s = time.monotonic()
    reply = await running.http.post("/v1/completions", json=BODY, headers={"x-request-timeout-s": "0.3"})
    assert "0.3 s" in assert_openai_error(reply, 408, "request_timeout")["message"]
    assert time.monotonic() - started_s < 5
    for wrong in ("0", "soon", "-1", "nan", "1e9"):
        reply = await running.http.post("/v1/completions", json=BODY, headers={"x-request-timeout-s": wrong})
        assert_openai_error(reply, 400, "invalid_request")


async def test_a_silent_stream_gets_heartbeats_and_then_its_tokens(start_gateway):
    async with start_gateway(heartbeat_s=0.1) as running:
        running.worker.script.step_s = 0.35
        async with running.http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as reply:
            lines = [line async for line in reply.aiter_lines() if line]
        assert lines[0] == ": heartbeat"
        assert lines[-1] == "data: [DONE]"
        assert sum(line.startswith("data: {") for line in lines) >= 3


async def test_a_failure_after_a_heartbeat_is_an_error_event(start_gateway):
    async with start_gateway(heartbeat_s=0.1) as running:
        running.worker.script.hold = True
        headers = {"x-request-timeout-s": "0.5"}
        async with running.http.stream(
            "POST", "/v1/completions", json={**BODY, "stream": True}, headers=headers
        ) as reply:
            assert reply.status_code == 200
            lines = [line async for line in reply.aiter_lines() if line]
        assert '"code":"request_timeout"' in lines[-2]
        assert lines[-1] == "data: [DONE]"


def test_without_keys_only_loopback_is_served():
    with pytest.raises(ConfigurationError, match="allow_unauthenticated"):
        GatewaySettings.from_environment(host="0.0.0.0")
    assert GatewaySettings.from_environment(host="0.0.0.0", api_key="sk").asks_for_keys
    assert GatewaySettings.from_environment(host="0.0.0.0", allow_unauthenticated=True)
    assert GatewaySettings.from_environment(host="::1")


def test_a_tenants_name_is_checked():
    with pytest.raises(InvalidRequest, match="at most 64"):
        mint("a b")
