"""`/v1/chat/completions` and `/v1/completions`; and the way from a body to a reply that other families take too."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from services.gateway.disconnect import unless_disconnected
from services.gateway.gateway import Gateway
from services.gateway.openapi import described
from services.gateway.replies.reply_format import ReplyFormat, collect
from services.gateway.replies.sse import EventStream
from services.gateway.replies.timing import timing_block
from services.gateway.requests.body_reader import read_body
from services.gateway.routes.request_route import RequestRoute
from services.gateway.schemas.chat import ChatBody
from services.gateway.schemas.completion import CompletionBody
from services.gateway.schemas.replies import ChatCompletionReply, TextCompletionReply
from services.gateway.sessions.generation import Generation

Open = Callable[[bytes, float], Awaitable[Generation]]
FormatOf = Callable[[Generation], ReplyFormat]


def router(gateway: Gateway) -> APIRouter:
    """OpenAI's generation endpoints."""
    routes = APIRouter(route_class=RequestRoute, tags=["generation"])
    pipeline = gateway.pipeline

    @routes.post("/v1/chat/completions", **described(ChatBody, ChatCompletionReply, streams=True))
    async def create_chat_completion(request: Request) -> Response:
        """Continues a conversation."""
        return await generate(gateway, request, pipeline.chat, pipeline.reply_format)

    @routes.post("/v1/completions", **described(CompletionBody, TextCompletionReply, streams=True))
    async def create_completion(request: Request) -> Response:
        """Continues texts."""
        return await generate(gateway, request, pipeline.completion, pipeline.reply_format)

    return routes


async def generate(gateway: Gateway, request: Request, start: Open, format_of: FormatOf) -> Response:
    """From the body to a reply that is complete, or about to stream. A client that leaves ends it at any point."""
    raw = await read_body(request, gateway.settings.max_body_bytes)
    generation = await unless_disconnected(request.scope, start(raw, time.monotonic()))
    reply = format_of(generation)
    if generation.request.stream:
        return EventStream(generation, reply, gateway.note_failure, heartbeat_s=gateway.settings.heartbeat_s)
    try:
        choices = await unless_disconnected(request.scope, collect(generation))
    finally:
        generation.close()
    timing = timing_block(generation) if generation.request.timing else None
    return Response(reply.whole(choices, generation.usage, timing), media_type="application/json")


async def complete(start: Open, format_of: FormatOf, raw: bytes, received_s: float) -> bytes:
    """From the body to the JSON of a whole reply, for who is no HTTP client.

    Raises:
        TandemError: It cannot be served, as the message says.
    """
    generation = await start(raw, received_s)
    try:
        choices = await collect(generation)
    finally:
        generation.close()
    return format_of(generation).whole(choices, generation.usage, None)
