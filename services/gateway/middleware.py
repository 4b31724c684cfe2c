"""What every HTTP exchange gets, whatever the route: an identity, and HEAD wherever there is GET."""

from __future__ import annotations

import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

SERVER_SEND = "tandem.server_send"
"""Where a scope has the server's own `send`. What wraps it on the way down looks at the start of a response only, so a
stream that has started may send its parts past all of it."""
_USABLE_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestIds:
    """Echoes `x-request-id`, or mints one; also as `request-id`, which Anthropic's clients read. In every log line."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves the ASGI call."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _USABLE_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = headers["request-id"] = request_id
            await send(message)

        scope[SERVER_SEND] = send
        with bound_contextvars(http_request_id=request_id):
            await self._app(scope, receive, send_with_id)


class HeadAsGet:
    """Answers HEAD with the headers of GET."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves the ASGI call."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self._app({**scope, "method": "GET"}, receive, send_head)
