"""Straight from a token to the client: the way that nearly every token of a stream goes.

While nothing happens to a stream but text, all that its task would do on waking is known beforehand: what comes before
and after the text in an event, and where the bytes go. So the pass over an engine step does it in place, on a few bytes
of memory per stream. A line takes no token that would have to wait for a slow reader: that one wakes the task, which
sends whatever has arrived when the reader is ready, and tokens go by line again once it waits for news.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import orjson

from services.gateway.http_protocol import chunk
from services.gateway.replies.choice_text import ChoiceText
from services.gateway.replies.event_body import EventBody
from services.gateway.replies.reply_format import ReplyFormat
from shared.tokenization.detokenizer import IncrementalDetokenizer


class DirectLine:
    """Of one choice of a stream whose body is open."""

    __slots__ = ("_after", "_before", "_body", "_detokenizer", "_transport")

    def __init__(self, detokenizer: IncrementalDetokenizer, around_text: tuple[bytes, bytes], body: EventBody) -> None:
        self._detokenizer = detokenizer
        self._before, self._after = around_text
        self._body = body
        self._transport = body.transport

    def send(self, token_id: int) -> bool:
        """Sends the text that became complete with a token, unless the client has not read what was sent before."""
        transport = self._transport
        if transport.get_write_buffer_size() or transport.is_closing():
            return False
        if text := self._detokenizer.push(token_id):
            transport.write(chunk(self._before + orjson.dumps(text) + self._after))
            self._body.sent_s = time.monotonic()
        return True


def lay_lines(texts: Iterable[ChoiceText], reply: ReplyFormat, body: EventBody) -> None:
    """Gives choices their lines, where the kind of reply has what that takes.

    Args:
        texts: Of plain choices.
        reply: Has formatted a first event.
        body: Is open.
    """
    for text in texts:
        if around_text := reply.around_text(text.index):
            text.choice.line = DirectLine(text.detokenizer, around_text, body).send
