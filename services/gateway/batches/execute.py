"""One request of a batch, served in the gateway as HTTP would serve it."""

from __future__ import annotations

import time

import orjson

from services.gateway.access.caller import current_caller
from services.gateway.embeddings.routes import embed
from services.gateway.gateway import Gateway
from services.gateway.responses.routes import respond
from services.gateway.routes.generation import complete
from shared.errors import InvalidRequest


async def execute(gateway: Gateway, endpoint: str, raw: bytes) -> bytes:
    """The JSON reply to a body.

    Raises:
        TandemError: It cannot be served, as the message says.
    """
    pipeline = gateway.pipeline
    await gateway.admission.count_request(current_caller())
    match endpoint:
        case "/v1/chat/completions":
            return await complete(pipeline.chat, pipeline.reply_format, raw, time.monotonic())
        case "/v1/completions":
            return await complete(pipeline.completion, pipeline.reply_format, raw, time.monotonic())
        case "/v1/embeddings":
            return orjson.dumps(await embed(gateway, raw))
        case "/v1/responses":
            return orjson.dumps(await respond(gateway, raw, time.monotonic()))
        case _:
            raise InvalidRequest(f"batches do not run {endpoint!r}", param="endpoint")
