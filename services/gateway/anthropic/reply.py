"""Replies of `/v1/messages`.

message_start, ping, (content_block_start, content_block_delta..., content_block_stop)..., message_delta, message_stop
"""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from services.gateway.anthropic.schemas import MessageReply, MessageUsage
from services.gateway.choice_text import Delta
from services.gateway.error_reply import anthropic_error
from services.gateway.generation import Generation, Usage
from services.gateway.replies import CollectedChoice
from shared.errors import TandemError

_TEXT_DELTA = (
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":',
    b"}}\n\n",
)


class MessagesReply:
    """A `message`, whole or as its events. One choice: Anthropic's API has no `n`."""

    def __init__(self, generation: Generation, model: str) -> None:
        self._id = "msg_" + generation.request.request_id.rpartition("-")[2]
        self._model = model
        self._prompt_tokens = generation.usage.prompt_tokens
        self._stop: tuple[str | None, str | None] = None, None

    def whole(self, choices: Sequence[CollectedChoice], usage: Usage, timing: dict[str, object] | None) -> bytes:
        """The JSON body of a reply that is not streamed."""
        [choice] = choices
        stop_reason, stop_sequence = _stop(choice.finish_reason, choice.stop_reason)
        content: list[dict[str, object]] = [{"type": "text", "text": choice.text}] if choice.text else []
        return orjson.dumps(self._message(content, stop_reason, stop_sequence, _usage(usage)).as_json())

    def opening(self) -> bytes:
        """The empty message, and the beginning of its one block."""
        start = self._message([], None, None, MessageUsage(input_tokens=self._prompt_tokens, output_tokens=0))
        block = {"type": "text", "text": ""}
        return (
            _event("message_start", {"message": start.as_json()})
            + _event("content_block_start", {"index": 0, "content_block": block})
            + _event("ping", {})
        )

    def events(self, deltas: Sequence[Delta]) -> bytes:
        """The deltas of the block."""
        pieces: list[bytes] = []
        for delta in deltas:
            if delta.text:
                pieces += [_TEXT_DELTA[0], orjson.dumps(delta.text), _TEXT_DELTA[1]]
            if delta.finish_reason is not None:
                self._stop = _stop(delta.finish_reason, delta.stop_reason)
        return b"".join(pieces)

    def closing(self, usage: Usage, timing: dict[str, object] | None) -> bytes:
        """The block's end, why it ended, and the tokens."""
        delta = {"stop_reason": self._stop[0], "stop_sequence": self._stop[1]}
        return (
            _event("content_block_stop", {"index": 0})
            + _event("message_delta", {"delta": delta, "usage": _usage(usage).model_dump()})
            + _event("message_stop", {})
        )

    def failure(self, error: TandemError) -> bytes:
        """An error event."""
        return b"event: error\ndata: " + orjson.dumps(anthropic_error(error.message, error.http_status)) + b"\n\n"

    def _message(
        self, content: list[dict[str, object]], stop_reason: str | None, stop_sequence: str | None, usage: MessageUsage
    ) -> MessageReply:
        return MessageReply(
            id=self._id,
            model=self._model,
            content=content,
            stop_reason=stop_reason,
            stop_sequence=stop_sequence,
            usage=usage,
        )


def _stop(finish_reason: str | None, stop_reason: str | int | None) -> tuple[str, str | None]:
    if finish_reason == "length":
        return "max_tokens", None
    return ("stop_sequence", stop_reason) if isinstance(stop_reason, str) else ("end_turn", None)


def _usage(usage: Usage) -> MessageUsage:
    cached = usage.cached_tokens
    return MessageUsage(
        input_tokens=usage.prompt_tokens - cached, output_tokens=usage.completion_tokens, cache_read_input_tokens=cached
    )


def _event(kind: str, content: dict[str, object]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps({"type": kind, **content}))
