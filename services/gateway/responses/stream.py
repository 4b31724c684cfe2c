"""A response's events on the wire: while it runs, or once more from the store."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.gateway.disconnect import unless_disconnected
from services.gateway.last_word import SHUT_DOWN
from services.gateway.replies.error_reply import error_response
from services.gateway.replies.event_body import HEADERS, MEDIA_TYPE, EventBody, EventResponse
from services.gateway.responses.runs import ResponseRun
from shared.errors import Cancelled


class ResponseEvents(EventResponse):
    """Events of a run as they come.

    A run that fails before its first event gets a proper status; after that the last event tells, also where the server
    shuts down. A client that leaves cancels a foreground run; one in the background goes on.
    """

    def __init__(self, run: ResponseRun, *, cancels: bool, position: int = 0) -> None:
        super().__init__()
        self._run = run
        self._cancels = cancels
        self._position = position

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves the ASGI call."""
        body = EventBody(scope, send)
        try:
            await unless_disconnected(scope, self._serve(body, scope, receive, send))
        except Cancelled:
            pass
        except asyncio.CancelledError:  # the server, shutting down
            self._run.stop(SHUT_DOWN.message)
            if body.is_open:
                await self._send_rest(body)
            raise
        finally:
            if self._cancels:
                self._run.cancel()

    async def _serve(self, body: EventBody, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._run.read(self._position)) as batches:
            async for events in batches:
                if not body.is_open and self._cancels and self._run.error is not None:
                    await error_response(self._run.error, scope)(scope, receive, send)
                    return
                await body.send(b"".join(events))
                self._position += len(events)
        await body.send(b"", is_last=True)

    async def _send_rest(self, body: EventBody) -> None:
        """Up to the last event, which tells how it ended."""
        await self._run.finished()
        await body.send(b"".join(self._run.builder.events[self._position :]), is_last=True)


class ReplayedEvents(Response):
    """Events that were kept."""

    media_type = MEDIA_TYPE

    def __init__(self, events: Sequence[bytes]) -> None:
        super().__init__(b"".join(events), headers=HEADERS)
