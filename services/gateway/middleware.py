"""What every HTTP exchange gets, whatever the route: an identity, and HEAD wherever there is GET.

The server speaks HTTP and nothing else (see `server`), so every call of these, and of other middleware, is an exchange.
"""

from __future__ import annotations

import re
import secrets

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars

SERVER_SEND = "tandem.server_send"
"""Where a scope has the server's own `send`. What wraps it on the way down looks at the start of a response only, so a
stream that has started may send its parts past all of it."""
_USABLE_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Middleware:
    """Wraps an application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app


class RequestIds(Middleware):
    """Echoes `x-request-id`, or mints one; also as `request-id`, which Anthropic's clients read. In every log line."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves the ASGI call."""
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _USABLE_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        raw_id = request_id.encode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                ids = ((b"x-request-id", raw_id), (b"request-id", raw_id))
                message = {**message, "headers": [*message["headers"], *ids]}
            await send(message)

        scope[SERVER_SEND] = send
        bind_contextvars(http_request_id=request_id)  # an exchange is a task, with a context of its own
        await self._app(scope, receive, send_with_id)


class HeadAsGet(Middleware):
    """Answers HEAD with the headers of GET."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves the ASGI call."""
        if scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self._app({**scope, "method": "GET"}, receive, send_head)
