"""What a request gets that the server ends, because the drain took too long: an answer, not a closed connection."""

from __future__ import annotations

import asyncio

from starlette.types import Message, Receive, Scope, Send

from services.gateway.middleware import Middleware
from services.gateway.replies.error_reply import error_response
from shared.errors import Unavailable

SHUT_DOWN = Unavailable("the gateway shut down before the reply was complete")


class LastWord(Middleware):
    """Answers a request whose task is cancelled before its response began. A stream that began says it itself."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves the ASGI call; returns where the server cancels it, because everything is said then."""
        has_begun = False

        async def send_noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        except asyncio.CancelledError:
            if not has_begun:
                await error_response(SHUT_DOWN, scope)(scope, receive, send)
