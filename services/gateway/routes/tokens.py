"""`/tokenize` and `/detokenize`, in vLLM's shapes."""

from __future__ import annotations

import time

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from services.gateway.gateway import Gateway
from services.gateway.openapi import described
from services.gateway.requests.body_reader import parse_object, read_body, validate
from services.gateway.requests.sampling_fields import checked_token_ids
from services.gateway.routes.request_route import RequestRoute
from services.gateway.schemas.tokens import (
    DetokenizeBody,
    DetokenizeReply,
    TokenizeChatBody,
    TokenizeReply,
    TokenizeTextBody,
)
from shared.identity import unpack_tokens


def router(gateway: Gateway) -> APIRouter:
    """Text to tokens and back, without a worker."""
    routes = APIRouter(route_class=RequestRoute, tags=["tokens"])

    @routes.post("/tokenize", **described((TokenizeTextBody, TokenizeChatBody), TokenizeReply))
    async def tokenize(request: Request) -> Response:
        """Token ids of a text, or of a conversation as the chat template renders it."""
        raw = await read_body(request, gateway.settings.max_body_bytes)
        return (await _tokenized(gateway, raw)).response()

    @routes.post("/detokenize", **described(DetokenizeBody, DetokenizeReply))
    async def detokenize(request: Request) -> Response:
        """The text of token ids, special tokens by their names."""
        raw = await read_body(request, gateway.settings.max_body_bytes)
        body = validate(parse_object(raw), DetokenizeBody, gateway.settings.unknown_fields)
        model = gateway.model
        model.check_name(body.model or model.name)
        token_ids = checked_token_ids(body.tokens, model.vocab_size, "tokens")
        text = b"".join(map(model.tokenizer.token_bytes, token_ids)).decode(errors="replace")
        return DetokenizeReply(prompt=text).response()

    return routes


async def _tokenized(gateway: Gateway, raw: bytes) -> TokenizeReply:
    content, settings, model, pipeline = parse_object(raw), gateway.settings, gateway.model, gateway.pipeline
    body: TokenizeTextBody | TokenizeChatBody
    if "messages" in content:
        content = {**content, "model": content.get("model") or model.name}
        body = chat = validate(content, TokenizeChatBody, settings.unknown_fields)
        model.check_name(chat.model)
        request = await pipeline.chat_request(chat, len(raw), created=int(time.time()))
        packed = await pipeline.tokenize(request.prompts[0], add_special_tokens=request.add_special_tokens)
    else:
        body = text = validate(content, TokenizeTextBody, settings.unknown_fields)
        model.check_name(text.model or model.name)
        packed = await pipeline.tokenize(text.prompt, add_special_tokens=text.add_special_tokens is not False)
    token_ids = unpack_tokens(packed)
    return TokenizeReply(
        count=len(token_ids),
        max_model_len=gateway.health.workers.context_len(model.max_model_len),
        tokens=token_ids,
        token_strs=[model.tokenizer.token_name(i) for i in token_ids] if body.return_token_strs else None,
    )
