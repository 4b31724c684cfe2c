"""`/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

import time
from functools import partial

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from services.gateway.anthropic.reply import MessagesReply
from services.gateway.anthropic.schemas import (
    CountReply,
    CountTokensBody,
    MessageErrorReply,
    MessageReply,
    MessagesBody,
)
from services.gateway.anthropic.translate import CLIENT_WORDS, chat_body
from services.gateway.gateway import Gateway
from services.gateway.openapi import described
from services.gateway.requests.body_reader import parse_body, read_body
from services.gateway.requests.client_words import in_words_of
from services.gateway.routes.generation import generate
from services.gateway.routes.request_route import RequestRoute
from services.gateway.sessions.generation import Generation
from shared.identity import TOKEN_BYTES


def router(gateway: Gateway) -> APIRouter:
    """Anthropic's endpoints."""
    routes = APIRouter(route_class=RequestRoute, tags=["messages"])
    unknown_fields = gateway.settings.unknown_fields

    async def start(raw: bytes, received_s: float) -> Generation:
        body = parse_body(raw, MessagesBody, unknown_fields)
        with in_words_of(CLIENT_WORDS):
            return await gateway.pipeline.chat_generation(chat_body(body, unknown_fields), len(raw), received_s)

    def format_of(generation: Generation) -> MessagesReply:
        return MessagesReply(generation, gateway.model.name)

    describe = partial(described, errors=MessageErrorReply)

    @routes.post("/v1/messages", **describe(MessagesBody, MessageReply, streams=True))
    async def create_message(request: Request) -> Response:
        """Answers a conversation."""
        return await generate(gateway, request, start, format_of)

    @routes.post("/v1/messages/count_tokens", **describe(CountTokensBody, CountReply))
    async def count_message_tokens(request: Request) -> Response:
        """Counts the tokens of a conversation as the model would read it."""
        raw = await read_body(request, gateway.settings.max_body_bytes)
        body = parse_body(raw, CountTokensBody, unknown_fields)
        with in_words_of(CLIENT_WORDS):
            translated = chat_body(body, unknown_fields)
            chat = await gateway.pipeline.chat_request(translated, len(raw), created=int(time.time()))
        packed = await gateway.pipeline.tokenize(chat.prompts[0], add_special_tokens=chat.add_special_tokens)
        return CountReply(input_tokens=len(packed) // TOKEN_BYTES).response()

    return routes
