"""Concurrent streamed chats over HTTP, each token stamped on arrival."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx

from loadtest.workload import ChatRequest


@dataclass(slots=True)
class StreamResult:
    """One finished stream.

    Attributes:
        ttft_s: Request sent to first content.
        itl_s: Times between content events.
        timing: The server's own timeline.
    """

    text: str = ""
    ttft_s: float = 0.0
    itl_s: list[float] = field(default_factory=list)
    output_tokens: int = 0
    prompt_tokens: int = 0
    timing: dict[str, object] = field(default_factory=dict)


async def stream_chat(client: httpx.AsyncClient, model: str, request: ChatRequest, **extra: object) -> StreamResult:
    """Sends one request and reads the stream to its end.

    Raises:
        RuntimeError: The server answered with an error, before or in the stream.
    """
    result = StreamResult()
    sent_s = last_s = time.perf_counter()
    body = {**request.body(model), "timing": True, **extra}
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"HTTP {response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            if usage := event.get("usage"):
                result.output_tokens, result.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
            if timing := event.get("timing"):
                result.timing = timing["sessions"][0]
            if event["choices"] and (content := event["choices"][0]["delta"].get("content")):
                now_s = time.perf_counter()
                if result.text:
                    result.itl_s.append(now_s - last_s)
                else:
                    result.ttft_s = now_s - sent_s
                result.text += content
                last_s = now_s
    return result


async def run_streams(
    url: str, requests: Sequence[ChatRequest], concurrency: int, **extra: object
) -> tuple[float, list[StreamResult]]:
    """Runs all requests, `concurrency` at a time; returns wall seconds and the results in order."""
    gate = asyncio.Semaphore(concurrency)
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]

        async def one(request: ChatRequest) -> StreamResult:
            async with gate:
                return await stream_chat(client, model, request, **extra)

        started_s = time.perf_counter()
        results = await asyncio.gather(*(one(request) for request in requests))
        return time.perf_counter() - started_s, list(results)
