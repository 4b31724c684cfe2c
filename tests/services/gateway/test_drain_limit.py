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


async def test_responses_that_outlast_the_drain_have_failed(start_gateway):
    async with httpx.AsyncClient(timeout=30) as client, contextlib.AsyncExitStack() as stack:
        running = await stack.enter_async_context(start_gateway())
        running.worker.script = Script(token_ids=[300] * 900, step_s=0.1)
        url, body = f"{running.url}/v1/responses", {"model": "pydoc-mini", "input": "hi", "max_output_tokens": 900}
        whole = asyncio.create_task(client.post(url, json=body))
        async with (
            client.stream("POST", url, json={**body, "stream": True}) as foreground,
            client.stream("POST", url, json={**body, "stream": True, "background": True}) as background,
        ):
            streams = [foreground.aiter_lines(), background.aiter_lines()]
            for lines in streams:
                await _line_of(lines, "response.output_text.delta")
            await running.worker.wait_for(lambda: len(running.worker.submits) == 3)
            stopping = asyncio.create_task(stack.aclose())
            for lines in streams:
                events = [json.loads(line.removeprefix("data: ")) async for line in lines if line.startswith("data: ")]
                *_, item_done, last = events
                assert item_done["type"] == "response.output_item.done"
                assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
                assert last["response"]["error"]["message"] == f"unavailable: {MESSAGE}"
                assert [event["sequence_number"] for event in events] == list(
                    range(events[0]["sequence_number"], last["sequence_number"] + 1)
                )
        reply = await whole
        assert (reply.status_code, reply.json()["error"]["message"]) == (503, MESSAGE)
        await stopping
        assert not running.open_sessions


async def test_response_whose_client_left_was_cancelled_and_has_not_failed(start_gateway):
    async with start_gateway() as running:
        running.worker.script = Script(token_ids=[300] * 900, step_s=0.1)
        body = {"model": "pydoc-mini", "input": "hi", "max_output_tokens": 900, "stream": True}
        async with running.http.stream("POST", "/v1/responses", json=body) as stream:
            created = json.loads((await _line_of(stream.aiter_lines(), "response.created")).removeprefix("data: "))
        async with asyncio.timeout(20):
            while (reply := await running.http.get(f"/v1/responses/{created['response']['id']}")).status_code != 200:
                await asyncio.sleep(0.05)
        assert (reply.json()["status"], reply.json()["error"]) == ("cancelled", None)


async def _line_of(lines, kind):
    """The first data line of that kind of event."""
    async for line in lines:
        if line.startswith("data: ") and json.loads(line.removeprefix("data: "))["type"] == kind:
            return line
    raise AssertionError(f"no {kind}")
