"""A streamed reply: server-sent events, from the first delta to `[DONE]`."""

from __future__ import annotations

from collections.abc import Callable

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.gateway.disconnect import unless_disconnected
from services.gateway.error_reply import error_response
from services.gateway.generation import Generation
from services.gateway.replies import ReplyFormat
from services.gateway.timing import timing_block
from shared.errors import Cancelled, InternalError, TandemError

log = structlog.get_logger(__name__)


class EventStream(Response):
    """Sends a generation while it runs, and closes it whatever happens.

    Nothing is sent before the first delta, so that a request that fails until then gets a proper status. A failure
    after that becomes an error event, and the stream still ends with `[DONE]`.
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, reply: ReplyFormat, on_failure: Callable[[TandemError], None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._generation = generation
        self._reply = reply
        self._on_failure = on_failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves the ASGI call."""
        try:
            await unless_disconnected(receive, self._serve(scope, receive, send))
        except Cancelled:
            log.debug("client_left", request_id=self._generation.request.request_id)
        finally:
            self._generation.close()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        batches = self._generation.batches()
        try:
            first = await anext(batches)
        except TandemError as exc:
            self._on_failure(exc)
            await error_response(exc, scope["path"])(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await _send_part(send, self._reply.opening() + self._reply.events(first))
        try:
            async for deltas in batches:
                await _send_part(send, self._reply.events(deltas))
            last = self._closing()
        except TandemError as exc:
            self._on_failure(exc)
            last = self._reply.failure(exc)
        except Exception:
            log.exception("stream_failed", request_id=self._generation.request.request_id)
            error = InternalError("internal error; the gateway's log has the details")
            self._on_failure(error)
            last = self._reply.failure(error)
        await send({"type": "http.response.body", "body": last, "more_body": False})

    def _closing(self) -> bytes:
        generation = self._generation
        return self._reply.closing(generation.usage, timing_block(generation) if generation.request.timing else None)


async def _send_part(send: Send, body: bytes) -> None:
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})
