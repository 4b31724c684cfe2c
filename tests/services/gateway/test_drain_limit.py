"""A stopping gateway waits for open requests so long and no longer; whoever is still there then is told."""

from __future__ import annotations

import asyncio
import contextlib
import json

import httpx

from tests.services.gateway.conftest import Script

BODY = {"model": "pydoc-mini", "prompt": [5, 6, 7], "max_tokens": 900}
MESSAGE = "the gateway shut down before the reply was complete"


async def test_request_that_outlasts_the_drain_ends_with_an_error(start_gateway):
    async with httpx.AsyncClient(timeout=30) as client, contextlib.AsyncExitStack() as stack:
        running = await stack.enter_async_context(start_gateway())
        running.worker.script = Script(token_ids=[300] * 900, step_s=0.1)
        url = f"{running.url}/v1/completions"
        whole = asyncio.create_task(client.post(url, json=BODY))
        async with client.stream("POST", url, json={**BODY, "stream": True}) as stream:
            lines = stream.aiter_lines()
            assert (await anext(lines)).startswith("data: ")
            await running.worker.wait_for(lambda: len(running.worker.submits) == 2)
            stopping = asyncio.create_task(stack.aclose())
            *_, error, done = [line.removeprefix("data: ") async for line in lines if line]
        assert json.loads(error)["error"]["message"] == MESSAGE
        assert done == "[DONE]"
        reply = await whole
        assert (reply.status_code, reply.json()["error"]["message"]) == (503, MESSAGE)
        assert reply.json()["error"]["code"] == "unavailable"
        await stopping
        assert not running.open_sessions
