"""HTTP/1.1 as clients may speak it here: uvicorn's protocol with bounds on what it waits for and keeps."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.gateway.replies.error_reply import error_body
from shared.errors import InvalidRequest, RequestTimeout, RequestTooLarge, TandemError

TRANSPORT = "tandem.transport"
"""Where a scope has its connection's transport."""
GONE = "tandem.gone"
"""Where a scope has a future that is done once its client's connection is lost."""

MAX_HEAD_BYTES = 64 << 10
"""Of a request's line and headers, as far as they come in more than one piece, and of what lies between the pieces of a
chunked body or behind them; no client's are near it."""
HEAD_S = 30.0
"""From a connection's start, or a further head's first byte, to the head's end."""
BODY_PAUSE_S = 60.0
"""Between two pieces of a body."""


def chunk(part: bytes) -> bytes:
    """A part of a body as it goes over a connection, where the body's length was not announced (RFC 9112, 7.1)."""
    return b"%x\r\n%b\r\n" % (len(part), part)


@contextlib.contextmanager
def in_one_piece(transport: asyncio.WriteTransport) -> Iterator[None]:
    """What is written meanwhile leaves together, so that whoever waits for it wakes once (`TCP_CORK` in tcp(7))."""
    connection = transport.get_extra_info("socket")
    if not transport.is_closing():
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    try:
        yield
    finally:
        if not transport.is_closing():  # else it leaves with the connection's end
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's, which neither waits nor keeps bytes without end.

    It tells every request its transport, too, and when the connection is lost.

    Trailers are read and dropped: uvicorn's would become headers of a request that is being served by them already.
    """

    _is_in_head = True
    _is_in_body = False
    _other_bytes = 0
    """That came since the last byte of a body, or the last whole head."""
    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connected."""
        super().connection_made(transport)
        self._gone: asyncio.Future[None] = self.loop.create_future()
        self._wait(HEAD_S)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._wait_no_more()
        super().connection_lost(exc)
        self._gone.set_result(None)

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        self._other_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._other_bytes > MAX_HEAD_BYTES:
            part = "line and headers" if self._is_in_head else "chunk sizes and trailers"
            error = RequestTooLarge(f"the request's {part} have more than {MAX_HEAD_BYTES} bytes")
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, error)
        elif self._is_in_body:
            self._wait(BODY_PAUSE_S)
        elif self._other_bytes and self._patience is None:
            self._wait(HEAD_S)

    def on_message_begin(self) -> None:
        """A request begins on this connection."""
        super().on_message_begin()
        self.scope[TRANSPORT], self.scope[GONE] = self.transport, self._gone  # type: ignore[literal-required]

    def on_header(self, name: bytes, value: bytes) -> None:
        """One of the head's, or a trailer."""
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The body follows."""
        self._is_in_head, self._is_in_body, self._other_bytes = False, True, 0
        self._wait_no_more()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Some of it."""
        self._other_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The next head follows."""
        self._is_in_head, self._is_in_body, self._other_bytes = True, False, 0
        self._wait_no_more()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP."""
        self._refuse(HTTPStatus.BAD_REQUEST, InvalidRequest("what came is no HTTP request"))

    def _wait(self, limit_s: float) -> None:
        """For the client, from now on."""
        self._wait_no_more()
        self._patience = self.loop.call_later(limit_s, self._give_up, limit_s)

    def _wait_no_more(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _give_up(self, limit_s: float) -> None:
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if self.flow.read_paused or (self._is_in_head and is_answering):
            self._wait(limit_s)  # it is not the client that is late
        elif self._is_in_body:
            error = RequestTimeout(f"no more of the request's body came for {limit_s:g} s")
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, error)
        elif self._other_bytes:
            error = RequestTimeout(f"{self._other_bytes} bytes of a request came within {limit_s:g} s, not its headers")
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, error)
        else:
            self.transport.close()

    def _refuse(self, status: HTTPStatus, error: TandemError) -> None:
        """The last that is said on this connection; nothing where a response has begun."""
        self._wait_no_more()
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = error_body(error)
            head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(head.encode() + b"content-type: application/json\r\nconnection: close\r\n\r\n" + body)
        self.transport.close()
