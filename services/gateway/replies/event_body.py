"""The body of an event stream, and the comment lines that keep it alive while nothing happens."""

from __future__ import annotations

import asyncio
import time

from starlette.responses import Response
from starlette.types import Scope, Send

from services.gateway.http_protocol import TRANSPORT, in_one_piece
from services.gateway.middleware import SERVER_SEND

HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""Of every event stream: nobody on the way keeps it back."""
HEARTBEAT = b": heartbeat\n\n"
"""A comment: every client of server-sent events skips it."""
MEDIA_TYPE = "text/event-stream"
_RAW_HEADERS = [
    (b"content-type", f"{MEDIA_TYPE}; charset=utf-8".encode()),
    *((name.encode(), value.encode()) for name, value in HEADERS.items()),
]


class EventResponse(Response):
    """A response whose body is an `EventBody`, which has headers too: there is nothing to prepare for each."""

    def __init__(self) -> None:
        self.status_code, self.background = 200, None


class EventBody:
    """Opened by the first part that is sent.

    A part and a heartbeat may be on their way to a slow reader at one time, in either order: each is whole events. Only
    opening must happen once.

    Attributes:
        is_open: The status was sent.
        sent_s: When something was sent last, `time.monotonic()`.
        transport: The connection's.
    """

    def __init__(self, scope: Scope, send: Send) -> None:
        self._send = send
        self._send_part: Send = scope.get(SERVER_SEND, send)
        self._opening = asyncio.Lock()
        self.sent_s = time.monotonic()
        self.is_open = False
        self.transport: asyncio.WriteTransport = scope[TRANSPORT]
        self._beats: asyncio.TimerHandle | asyncio.Task[None] | None = None

    async def send(self, part: bytes, *, is_last: bool = False) -> None:
        """Sends a part; an empty one is nothing unless it is the last."""
        if not part and not is_last:
            return
        if self.is_open:
            await self._send_on(part, is_last=is_last)
            return
        with in_one_piece(self.transport):
            async with self._opening:
                if not self.is_open:
                    await self._send({"type": "http.response.start", "status": 200, "headers": [*_RAW_HEADERS]})
                    self.is_open = True
            await self._send_on(part, is_last=is_last)

    async def _send_on(self, part: bytes, *, is_last: bool) -> None:
        self.sent_s = time.monotonic()
        await self._send_part({"type": "http.response.body", "body": part, "more_body": not is_last})

    def beat(self, interval_s: float) -> None:
        """Sends a heartbeat whenever nothing was sent for `interval_s`, until `beat_no_more`."""
        # Most streams are never silent for so long: these cost a timer, not a task.
        self._beats = asyncio.get_running_loop().call_later(interval_s, self._begin_to_beat, interval_s)

    def beat_no_more(self) -> None:
        """The stream ends."""
        if self._beats is not None:
            self._beats.cancel()

    def _begin_to_beat(self, interval_s: float) -> None:
        self._beats = asyncio.create_task(self._beat(interval_s))

    async def _beat(self, interval_s: float) -> None:
        while True:
            silent_s = time.monotonic() - self.sent_s
            if silent_s >= interval_s:
                await self.send(HEARTBEAT)
                silent_s = 0.0
            await asyncio.sleep(interval_s - silent_s)
