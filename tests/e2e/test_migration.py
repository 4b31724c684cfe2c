"""A decode worker that dies, drains or falls silent mid-stream costs a pause: the stream goes on, token for token."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
import uuid
from collections import defaultdict

import httpx
import pytest

from loadtest.fleet import Fleet

PROMPT = "The report was read twice and filed. Nobody asked for a second copy. " * 12
BODY = {"model": "pydoc-mini", "prompt": PROMPT, "max_tokens": 320, "stream": True, "timing": True}
NUM_WORKERS = 3

FIELDS = {
    # One choice is soon over: many tokens, so that there is time to find out who computes them.
    "greedy-logprobs": {"temperature": 0, "logprobs": 2, "ignore_eos": True, "max_tokens": 1000},
    "seeded-n4-penalties": {
        "temperature": 0.9,
        "seed": 7,
        "n": 4,
        "top_p": 0.95,
        "ignore_eos": True,
        "presence_penalty": 0.6,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
    },
    "schema-n3-logprobs": {
        "guided_json": {
            "type": "object",
            "properties": {"items": {"type": "array", "items": {"type": "integer"}, "minItems": 60, "maxItems": 60}},
            "required": ["items"],
            "additionalProperties": False,
        },
        "temperature": 1.0,
        "seed": 5,
        "n": 3,
        "logprobs": 1,
        "max_tokens": 900,
    },
    "stop-strings-min-tokens": {
        "temperature": 1.1,
        "seed": 3,
        "n": 4,
        "stop": ["the", "of a"],
        "min_tokens": 60,
        "logprobs": 0,
    },
}


async def read_stream(url: str, after_tokens: int = -1, disturb=None, **fields) -> dict:
    """Reads a stream to its end; calls `disturb` once, when so many content events have come."""
    reply = {"text": defaultdict(str), "logprobs": defaultdict(list), "finish": {}, "error": None, "events": 0}
    body = {**BODY, **fields, "stream_options": {"include_usage": True}, "cache_salt": uuid.uuid4().hex}
    async with (
        httpx.AsyncClient(timeout=90) as client,
        client.stream("POST", f"{url}/v1/completions", json=body) as stream,
    ):
        assert stream.status_code == 200, await stream.aread()
        async for line in stream.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            reply["error"] = event.get("error", reply["error"])
            reply["usage"] = event.get("usage")
            if timing := event.get("timing"):
                reply["timing"] = timing["sessions"][0]
            for choice in event.get("choices", ()):
                reply["text"][choice["index"]] += choice["text"]
                if choice.get("logprobs"):
                    reply["logprobs"][choice["index"]] += choice["logprobs"]["tokens"]
                if choice["finish_reason"]:
                    reply["finish"][choice["index"]] = choice["finish_reason"], choice["stop_reason"]
                reply["events"] += 1
            if disturb is not None and reply["events"] > after_tokens:
                await disturb()
                disturb = None
    assert disturb is None, "the stream ended before it was disturbed"
    return reply


def assert_equal_streams(disturbed: dict, undisturbed: dict) -> None:
    assert disturbed["error"] is None
    for part in ("text", "logprobs", "finish", "usage"):
        assert disturbed[part] == undisturbed[part], part


def assert_first_loss(reply: dict, code: str) -> None:
    """A machine too crowded to answer a ping in time costs a further migration, and no token either."""
    first, *further = reply["timing"]["migrations"]
    assert first == code
    assert set(further) <= {"worker_lost"}


@pytest.mark.parametrize("name", FIELDS)
async def test_killed_worker_costs_a_pause_and_no_token(suite, name):
    async with Fleet(suite.redis_url) as fleet:
        await fleet.until_ready(NUM_WORKERS)
        undisturbed = await read_stream(suite.url, **FIELDS[name])

        async def kill():
            os.kill((await fleet.running_decode_worker()).pid, signal.SIGKILL)

        disturbed = await read_stream(suite.url, 10, kill, **FIELDS[name])
        assert_equal_streams(disturbed, undisturbed)
        assert_first_loss(disturbed, "worker_lost")
        await fleet.until_ready(NUM_WORKERS)
        await fleet.until_free()


@pytest.mark.parametrize("name", ["seeded-n4-penalties"])
async def test_draining_worker_hands_its_sessions_on_and_exits_with_0(suite, name):
    async with Fleet(suite.redis_url) as fleet:
        await fleet.until_ready(NUM_WORKERS)
        undisturbed = await read_stream(suite.url, **FIELDS[name], max_tokens=400)

        async def terminate():
            os.kill((await fleet.running_decode_worker()).pid, signal.SIGTERM)

        disturbed = await read_stream(suite.url, 10, terminate, **FIELDS[name], max_tokens=400)
        assert_equal_streams(disturbed, undisturbed)
        assert_first_loss(disturbed, "worker_draining")
        await fleet.until_ready(NUM_WORKERS)
        await fleet.until_free()
        assert "restarting: exited with status 0" in (suite.run_dir / "logs" / "supervisor.log").read_text()


async def test_silent_worker_is_given_up_and_frees_what_it_held_when_it_wakes(suite):
    async with Fleet(suite.redis_url) as fleet:
        await fleet.until_ready(NUM_WORKERS)
        fields = FIELDS["greedy-logprobs"]
        undisturbed = await read_stream(suite.url, **fields)
        silent = []

        async def pause():
            silent.append((await fleet.running_decode_worker()).pid)
            os.kill(silent[0], signal.SIGSTOP)

        try:
            disturbed = await asyncio.wait_for(read_stream(suite.url, 10, pause, **fields), 30)
        finally:
            for pid in silent:
                os.kill(pid, signal.SIGCONT)
        assert_equal_streams(disturbed, undisturbed)
        assert_first_loss(disturbed, "worker_lost")
        await fleet.until_ready(NUM_WORKERS)
        await fleet.until_free()


async def test_reply_that_is_not_streamed_survives_too(suite):
    async with Fleet(suite.redis_url) as fleet:
        await fleet.until_ready(NUM_WORKERS)
        body = {**BODY, **FIELDS["seeded-n4-penalties"], "stream": False}

        async def ask() -> dict:
            async with httpx.AsyncClient(timeout=90) as client:
                salted = {**body, "cache_salt": uuid.uuid4().hex}
                reply = await client.post(f"{suite.url}/v1/completions", json=salted)
                assert reply.status_code == 200, reply.text
                return reply.json()

        undisturbed = await ask()
        request = asyncio.create_task(ask())
        os.kill((await fleet.running_decode_worker()).pid, signal.SIGKILL)
        disturbed = await request
        assert disturbed["choices"] == undisturbed["choices"]
        assert disturbed["usage"] == undisturbed["usage"]
        await fleet.until_ready(NUM_WORKERS)
        await fleet.until_free()


@pytest.mark.timeout(400)  # a busy machine takes long to start workers
async def test_rolling_restart_of_everything_under_load_fails_no_request(suite):
    """Every worker, then the gateway, whose clients try again when a connection is refused, and only then."""
    fields = {"temperature": 0.8, "ignore_eos": True, "max_tokens": 100}
    async with Fleet(suite.redis_url) as fleet:
        await fleet.until_ready(NUM_WORKERS)
        expected = [await read_stream(suite.url, **fields, seed=seed) for seed in range(3)]
        is_over, counts = asyncio.Event(), [0, 0, 0]

        async def load(seed: int) -> None:
            while not is_over.is_set():
                try:
                    reply = await read_stream(suite.url, **fields, seed=seed)
                except httpx.ConnectError:
                    await asyncio.sleep(0.1)
                    continue
                assert_equal_streams(reply, expected[seed])
                counts[seed] += 1

        loads = [asyncio.create_task(load(seed)) for seed in range(3)]
        try:
            names = [worker["worker_id"] for worker in suite.status()["workers"]]
            for name in [*names, "gateway"]:
                await asyncio.to_thread(restart, suite, name)
        finally:
            is_over.set()
            await asyncio.gather(*loads)
        assert min(counts) > 5
        await fleet.until_free()


def restart(suite, name: str) -> None:
    """SIGTERM, and its successor is ready."""
    log = suite.run_dir / "logs" / "supervisor.log"
    before = log.read_text().count(f"{name:<20} ready")
    process = next(process for process in suite.status()["processes"] if process["name"] == name)
    os.kill(process["pid"], signal.SIGTERM)
    deadline = time.monotonic() + 90
    while log.read_text().count(f"{name:<20} ready") == before:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    lines = [line for line in log.read_text().splitlines() if f"{name:<20} restarting" in line]
    assert "exited with status 0" in lines[-1], lines
