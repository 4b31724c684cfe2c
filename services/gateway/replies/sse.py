"""A streamed reply: server-sent events, from the first delta to `[DONE]`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog
from starlette.types import Receive, Scope, Send

from services.gateway.disconnect import unless_disconnected
from services.gateway.last_word import SHUT_DOWN
from services.gateway.replies.direct_line import lay_lines
from services.gateway.replies.error_reply import error_response
from services.gateway.replies.event_body import EventBody, EventResponse
from services.gateway.replies.reply_format import ReplyFormat
from services.gateway.replies.timing import timing_block
from services.gateway.sessions.generation import Generation
from shared.errors import Cancelled, InternalError, TandemError

log = structlog.get_logger(__name__)


class EventStream(EventResponse):
    """Sends a generation while it runs, and closes it whatever happens.

    Nothing is sent before the first delta, so that a request that fails until then gets a proper status; only a stream
    that is silent for longer than `heartbeat_s` is opened by a comment line, and then a failure becomes an error event
    as it does later on. The stream always ends with `[DONE]`.
    """

    def __init__(
        self,
        generation: Generation,
        reply: ReplyFormat,
        on_failure: Callable[[TandemError], None],
        *,
        heartbeat_s: float = 0.0,
    ) -> None:
        super().__init__()
        self._generation = generation
        self._reply = reply
        self._on_failure = on_failure
        self._heartbeat_s = heartbeat_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves the ASGI call."""
        try:
            await unless_disconnected(scope, self._serve(scope, receive, send))
        except Cancelled:
            log.debug("client_left", request_id=self._generation.request.request_id)
        finally:
            self._generation.close()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = EventBody(scope, send)
        if self._heartbeat_s:
            body.beat(self._heartbeat_s)
        try:
            last = await self._send_deltas(body)
        except TandemError as exc:
            self._on_failure(exc)
            if not body.is_open:
                await error_response(exc, scope)(scope, receive, send)
                return
            last = self._reply.failure(exc)
        except Exception:
            log.exception("stream_failed", request_id=self._generation.request.request_id)
            error = InternalError("internal error; the gateway's log has the details")
            self._on_failure(error)
            if not body.is_open:
                raise
            last = self._reply.failure(error)
        except asyncio.CancelledError:
            # The server, shutting down; or the client has left, and hears nothing of it.
            if body.is_open:
                await body.send(self._reply.failure(SHUT_DOWN), is_last=True)
            raise
        finally:
            body.beat_no_more()
        await body.send(last, is_last=True)

    async def _send_deltas(self, body: EventBody) -> bytes:
        """Sends all but the last part, which it returns: the end goes with the last deltas."""
        generation, opening, part = self._generation, self._reply.opening, b""
        async for deltas in generation.batches():
            part, is_first = opening() + self._reply.events(deltas), opening is not bytes
            opening = bytes
            if not generation.is_over:
                await body.send(part)
                part = b""
                if is_first:
                    lay_lines(generation.plain_texts, self._reply, body)
        timing = timing_block(generation) if generation.request.timing else None
        return part + opening() + self._reply.closing(generation.usage, timing)
