"""`/v1/responses`."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Annotated, Literal

import orjson
from fastapi import APIRouter
from fastapi.params import Query
from starlette.requests import Request
from starlette.responses import Response

from services.gateway.disconnect import unless_disconnected
from services.gateway.gateway import Gateway
from services.gateway.last_word import SHUT_DOWN
from services.gateway.openapi import described
from services.gateway.pages import page
from services.gateway.requests.body_reader import parse_body, read_body
from services.gateway.requests.client_words import in_words_of
from services.gateway.requests.request import GenerationRequest
from services.gateway.responses.input_items import Item, input_items
from services.gateway.responses.reply import ResponseBuilder
from services.gateway.responses.runs import ResponseRun
from services.gateway.responses.schemas import (
    DeletedReply,
    InputItemList,
    InputTokensReply,
    PromptBody,
    ResponseBody,
    ResponseReply,
)
from services.gateway.responses.store import IN_WORK
from services.gateway.responses.stream import ReplayedEvents, ResponseEvents
from services.gateway.responses.translate import CLIENT_WORDS, chat_body
from services.gateway.sessions.generation import Generation
from shared.errors import InvalidRequest, NotFound
from shared.identity import TOKEN_BYTES

Order = Literal["asc", "desc"]


def router(gateway: Gateway) -> APIRouter:
    """OpenAI's Responses API."""
    routes = APIRouter(tags=["responses"])
    store, background = gateway.responses, gateway.background

    @routes.post("/v1/responses", **described(ResponseBody, ResponseReply, streams=True))
    async def create_response(request: Request) -> Response:
        """Answers a conversation, now or in the background."""
        received_s = time.monotonic()
        raw = await read_body(request, gateway.settings.max_body_bytes)
        body = parse_body(raw, ResponseBody, gateway.settings.unknown_fields)
        run = await _prepared(gateway, body, len(raw), received_s)
        if body.background:
            await background.launch(run)
            return ResponseEvents(run, cancels=False) if body.stream else _json(run.builder.as_json())
        return await _foreground(request, run, bool(body.stream))

    @routes.post("/v1/responses/input_tokens", **described(PromptBody, InputTokensReply))
    async def count_input_tokens(request: Request) -> Response:
        """Counts the tokens of a conversation as the model would read it."""
        raw = await read_body(request, gateway.settings.max_body_bytes)
        body = parse_body(raw, PromptBody, gateway.settings.unknown_fields)
        context, asked = await _conversation(gateway, body)
        with in_words_of(CLIENT_WORDS):
            chat = chat_body(body, [*context, *asked], gateway.settings.unknown_fields)
            wanted = await gateway.pipeline.chat_request(chat, len(raw), created=int(time.time()))
        packed = await gateway.pipeline.tokenize(wanted.prompts[0], add_special_tokens=wanted.add_special_tokens)
        return InputTokensReply(input_tokens=len(packed) // TOKEN_BYTES).response()

    @routes.get("/v1/responses/{response_id}", **described(None, ResponseReply, streams=True))
    async def retrieve_response(
        response_id: str, stream: bool = False, starting_after: Annotated[int, Query(ge=-1)] = -1
    ) -> Response:
        """A stored response; or, of one that was streamed in the background, its events once more."""
        run = background.get(response_id)
        if not stream:
            if starting_after >= 0:
                raise InvalidRequest("'starting_after' counts events: it needs 'stream': true", param="starting_after")
            return _json(run.builder.as_json() if run else (await store.get(response_id)).response)
        if run is not None and run.builder.events:
            return ResponseEvents(run, cancels=False, position=starting_after + 1)
        await store.get(response_id)
        if not (events := await store.events(response_id)):
            raise InvalidRequest(
                "only events of responses created with 'background' and 'stream' are kept; while such a response runs, "
                "the gateway that runs it has them",
                param="stream",
            )
        return ReplayedEvents(events[starting_after + 1 :])

    @routes.post("/v1/responses/{response_id}/cancel", **described(None, ResponseReply))
    async def cancel_response(response_id: str) -> Response:
        """Ends a background response; what was generated so far stays."""
        response = (await store.get(response_id)).response
        if not response["background"]:
            raise InvalidRequest("only background responses can be cancelled", param="response_id")
        if response["status"] not in IN_WORK:
            return _json(response)
        if run := background.get(response_id):
            run.cancel()
            await run.finished()
            return _json(run.builder.as_json())
        await store.ask_to_cancel(response_id)
        return _json({**response, "status": "cancelled"})

    @routes.delete("/v1/responses/{response_id}", **described(None, DeletedReply))
    async def delete_response(response_id: str) -> Response:
        """Forgets a response; one that still runs is ended first."""
        if run := background.get(response_id):
            run.delete()
            await run.finished()
        await store.delete(response_id)
        return _json({"id": response_id, "object": "response", "deleted": True})

    @routes.get("/v1/responses/{response_id}/input_items", **described(None, InputItemList))
    async def list_input_items(
        response_id: str,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Order = "desc",
        after: str = "",
    ) -> Response:
        """What a response was asked, itself: the items of earlier turns are listed by their own responses."""
        items = (await store.get(response_id)).asked
        return _page(items if order == "asc" else items[::-1], limit, after).response()

    return routes


async def respond(gateway: Gateway, raw: bytes, received_s: float) -> dict[str, object]:
    """From the body to a whole response, for who is no HTTP client.

    Raises:
        TandemError: It cannot be served, as the message says.
    """
    body = parse_body(raw, ResponseBody, gateway.settings.unknown_fields)
    run = await _prepared(gateway, body, len(raw), received_s)
    run.launch()
    try:
        await run.finished()
    finally:
        run.cancel()
    if run.error is not None:
        raise run.error
    return run.builder.as_json()


async def _prepared(gateway: Gateway, body: ResponseBody, num_chars: int, received_s: float) -> ResponseRun:
    """A run that was checked and not begun."""
    context, asked = await _conversation(gateway, body)
    if body.store is not False:
        gateway.responses.check_size([*context, *asked])
    with in_words_of(CLIENT_WORDS):
        chat = chat_body(body, [*context, *asked], gateway.settings.unknown_fields)
        request = await gateway.pipeline.chat_request(chat, num_chars, created=int(time.time()))
    builder = ResponseBuilder(body, request, gateway.model.tokenizer)
    start = partial(_start, gateway, request, received_s)
    return ResponseRun(builder, asked, context, gateway.responses, start)


async def _start(gateway: Gateway, request: GenerationRequest, received_s: float) -> Generation:
    with in_words_of(CLIENT_WORDS):
        return await gateway.pipeline.start(request, received_s)


async def _conversation(gateway: Gateway, body: PromptBody) -> tuple[list[Item], list[Item]]:
    """The items before, and those asked now.

    Raises:
        NotFound: There is no such previous response.
        InvalidRequest: It has not ended well, or the input cannot be served.
    """
    asked = input_items(body.input, gateway.settings.unknown_fields)
    if body.previous_response_id is None:
        return [], asked
    try:
        record = await gateway.responses.get(body.previous_response_id)
    except NotFound as exc:
        raise NotFound(exc.message, param="previous_response_id") from exc
    status = record.response["status"]
    if status not in ("completed", "incomplete"):
        raise InvalidRequest(f"the previous response is {status}, not completed", param="previous_response_id")
    return record.conversation, asked


async def _foreground(request: Request, run: ResponseRun, stream: bool) -> Response:
    """A run that ends when its client leaves."""
    run.launch()
    if stream:
        return ResponseEvents(run, cancels=True)
    try:
        await unless_disconnected(request.scope, run.finished())
    except asyncio.CancelledError:  # the server, shutting down
        run.stop(SHUT_DOWN.message)
        raise
    finally:
        run.cancel()
    if run.error is not None:
        raise run.error
    return _json(run.builder.as_json())


def _page(items: list[Item], limit: int, after: str) -> InputItemList:
    shown, has_more = page(items, [item["id"] for item in items], limit, after, unknown="there is no item {} in it")
    return InputItemList(
        data=shown,
        first_id=shown[0]["id"] if shown else None,
        last_id=shown[-1]["id"] if shown else None,
        has_more=has_more,
    )


def _json(content: dict[str, object]) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
