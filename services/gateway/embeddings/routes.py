"""`/v1/embeddings`."""

from __future__ import annotations

import base64
from array import array

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from services.gateway.access.caller import Caller, current_caller
from services.gateway.disconnect import unless_disconnected
from services.gateway.embeddings.call import EmbedCall
from services.gateway.embeddings.schemas import EmbeddingBody, EmbeddingReply
from services.gateway.gateway import Gateway
from services.gateway.openapi import described
from services.gateway.requests.body_reader import parse_body, read_body
from services.gateway.requests.validation import prompts_of
from services.gateway.routes.request_route import RequestRoute
from shared.errors import ContextLengthExceeded, InvalidRequest, UnsupportedField
from shared.identity import unpack_tokens

INPUTS_PER_CALL = 128


def router(gateway: Gateway) -> APIRouter:
    """The embedding endpoint."""
    routes = APIRouter(route_class=RequestRoute, tags=["embeddings"])

    @routes.post("/v1/embeddings", **described(EmbeddingBody, EmbeddingReply))
    async def create_embeddings(request: Request) -> Response:
        """Vectors of texts."""
        raw = await read_body(request, gateway.settings.max_body_bytes)
        reply = await unless_disconnected(request.scope, embed(gateway, raw))
        return Response(orjson.dumps(reply), media_type="application/json")

    return routes


async def embed(gateway: Gateway, raw: bytes) -> dict[str, object]:
    """From the body to the reply.

    Raises:
        TandemError: It cannot be served, as the message says.
    """
    settings, model = gateway.settings, gateway.model
    body = parse_body(raw, EmbeddingBody, settings.unknown_fields)
    model.check_name(body.model)
    inputs = await _token_ids(gateway, body)
    _check_dimensions(gateway, body.dimensions)
    if body.use_activation not in (None, body.normalize) and body.normalize is not None:
        raise InvalidRequest("'use_activation' and 'normalize' are one switch", param="use_activation")
    caller = current_caller()
    ticket = await gateway.admission.enter(caller, model.name, sum(map(len, inputs)))
    try:
        vectors = await _vectors(gateway, body, inputs, caller)
    finally:
        ticket.close(0)
    return _reply(model.name, vectors, inputs, is_base64=body.encoding_format == "base64")


async def _vectors(gateway: Gateway, body: EmbeddingBody, inputs: list[list[int]], caller: Caller) -> bytearray:
    embedding, timeout_s = gateway.model.embedding, caller.timeout_s or gateway.settings.request_timeout_s
    normalize = body.use_activation if body.normalize is None else body.normalize
    vectors = bytearray()
    for begin in range(0, len(inputs), INPUTS_PER_CALL):
        call = EmbedCall(
            inputs[begin : begin + INPUTS_PER_CALL],
            pooling=embedding.pooling,
            normalize=embedding.normalize if normalize is None else normalize,
            dimensions=body.dimensions or 0,
            cache_salt=body.cache_salt or "",
            priority=(body.priority or 0) + caller.priority,
        )
        vectors += await gateway.health.workers.embed(call, timeout_s)
    return vectors


async def _token_ids(gateway: Gateway, body: EmbeddingBody) -> list[list[int]]:
    model, limit = gateway.model, gateway.settings.max_embedding_inputs
    prompts = prompts_of(body.input, model.vocab_size, "input")
    if len(prompts) > limit:
        raise InvalidRequest(f"{len(prompts)} inputs, at most {limit} are embedded in one request", param="input")
    room = gateway.health.workers.context_len(model.max_model_len)
    room = min(room, model.embedding.max_tokens or room)
    for index, prompt in enumerate(prompts):  # before it is tokenized, which takes seconds for one of megabytes
        if isinstance(prompt, str) and (least := model.tokenizer.least_tokens(prompt)) > room:
            raise ContextLengthExceeded(
                f"input {index} has at least {least} tokens; at most {room} are embedded", param="input"
            )
    special = body.add_special_tokens is not False
    inputs = [unpack_tokens(await gateway.pipeline.tokenize(prompt, add_special_tokens=special)) for prompt in prompts]
    for index, token_ids in enumerate(inputs):
        if not token_ids:
            raise InvalidRequest(f"input {index} is empty: it has no tokens", param="input")
        if len(token_ids) > room:
            raise ContextLengthExceeded(
                f"input {index} has {len(token_ids)} tokens; at most {room} are embedded", param="input"
            )
    return inputs


def _check_dimensions(gateway: Gateway, wanted: int | None) -> None:
    embedding = gateway.model.embedding
    if wanted is None or wanted == embedding.size:
        return
    if embedding.dimensions is None:
        raise UnsupportedField(
            f"'dimensions' is not supported: the model's vectors have {embedding.size} dimensions and were not trained "
            "to be cut (no Matryoshka fields in its config.json)",
            param="dimensions",
        )
    if wanted > embedding.size or (embedding.dimensions and wanted not in embedding.dimensions):
        allowed = ", ".join(map(str, embedding.dimensions)) or f"1 to {embedding.size}"
        raise InvalidRequest(f"'dimensions' is {wanted}, the model allows {allowed}", param="dimensions")


def _reply(model: str, vectors: bytearray, inputs: list[list[int]], *, is_base64: bool) -> dict[str, object]:
    width, num_tokens = len(vectors) // len(inputs), sum(map(len, inputs))
    rows = [bytes(vectors[begin : begin + width]) for begin in range(0, len(vectors), width)]
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(row).decode() if is_base64 else array("f", row).tolist(),
        }
        for index, row in enumerate(rows)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}
