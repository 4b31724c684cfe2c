"""The body of an event stream, and the comment lines that keep it alive while nothing happens."""

from __future__ import annotations

import asyncio
import time

from starlette.types import Scope, Send

from services.gateway.http_protocol import TRANSPORT
from services.gateway.middleware import SERVER_SEND

HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""Of every event stream: nobody on the way keeps it back."""
HEARTBEAT = b": heartbeat\n\n"
"""A comment: every client of server-sent events skips it."""


class EventBody:
    """Opened by the first part that is sent.

    A part and a heartbeat may be on their way to a slow reader at one time, in either order: each is whole events. Only
    opening must happen once.

    Attributes:
        is_open: The status was sent.
        sent_s: When something was sent last, `time.monotonic()`.
        transport: The connection's; None if the server tells none.
    """

    def __init__(self, scope: Scope, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        self._send = send
        self._send_part: Send = scope.get(SERVER_SEND, send)
        self._headers = headers
        self._opening = asyncio.Lock()
        self.sent_s = time.monotonic()
        self.is_open = False
        self.transport: asyncio.WriteTransport | None = scope.get(TRANSPORT)

    async def send(self, part: bytes, *, is_last: bool = False) -> None:
        """Sends a part; an empty one is nothing unless it is the last."""
        if not part and not is_last:
            return
        if not self.is_open:
            await self._open()
        self.sent_s = time.monotonic()
        await self._send_part({"type": "http.response.body", "body": part, "more_body": not is_last})

    async def _open(self) -> None:
        async with self._opening:
            if not self.is_open:
                await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})
                self.is_open = True

    async def beat(self, interval_s: float) -> None:
        """Sends a heartbeat whenever nothing was sent for `interval_s`, until cancelled."""
        while True:
            silent_s = time.monotonic() - self.sent_s
            if silent_s >= interval_s:
                await self.send(HEARTBEAT)
                silent_s = 0.0
            await asyncio.sleep(interval_s - silent_s)
