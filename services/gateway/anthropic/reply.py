"""Replies of `/v1/messages`.

    message_start, ping, (content_block_start, content_block_delta..., content_block_stop)...,
    message_delta, message_stop

A block is thinking, text, or one tool call; the next one begins when something of another kind comes.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import orjson

from services.gateway.anthropic.schemas import MessageReply, MessageUsage
from services.gateway.replies.choice_text import Delta
from services.gateway.replies.error_reply import anthropic_error
from services.gateway.replies.reply_format import CollectedChoice
from services.gateway.sessions.generation import Generation, Usage
from shared.errors import TandemError

_DELTAS = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
}
_AFTER = b"}}\n\n"


class MessagesReply:
    """A `message`, whole or as its events. One choice: Anthropic's API has no `n`."""

    def __init__(self, generation: Generation, model: str) -> None:
        self._id = "msg_" + generation.request.request_id.rpartition("-")[2]
        self._model = model
        self._prompt_tokens = generation.usage.prompt_tokens
        self._stop: tuple[str | None, str | None] = None, None
        self._num_blocks = 0
        self._open = ""  # kind of the last block, "" when it is closed
        self._before = b""  # what comes before the text in a delta of it

    def whole(self, choices: Sequence[CollectedChoice], usage: Usage, timing: dict[str, object] | None) -> bytes:
        """The JSON body of a reply that is not streamed."""
        [choice] = choices
        content: list[dict[str, object]] = []
        if choice.reasoning:
            content.append(_block("thinking", thinking="".join(choice.reasoning)))
        if choice.text:
            content.append(_block("text", text=choice.text))
        content += [_block("tool_use", name=call.name, input=_object(call.arguments)) for call in choice.calls]
        stop_reason, stop_sequence = _stop(choice.finish_reason, choice.stop_reason)
        return orjson.dumps(self._message(content, stop_reason, stop_sequence, _usage(usage)).as_json())

    def opening(self) -> bytes:
        """The empty message."""
        start = self._message([], None, None, MessageUsage(input_tokens=self._prompt_tokens, output_tokens=0))
        return _event("message_start", {"message": start.as_json()}) + _event("ping", {})

    def events(self, deltas: Sequence[Delta]) -> bytes:
        """Deltas of blocks, and where blocks begin and end."""
        pieces: list[bytes] = []
        for delta in deltas:
            if delta.reasoning:
                pieces += self._piece("thinking", delta.reasoning)
            if delta.text:
                pieces += self._piece("text", delta.text)
            for call in delta.calls:
                if call.name is not None:
                    pieces += [self._close(), self._begin("tool_use", name=call.name)]
                if call.arguments:
                    pieces += self._piece("tool_use", call.arguments)
            if delta.finish_reason is not None:
                self._stop = _stop(delta.finish_reason, delta.stop_reason)
        return b"".join(pieces)

    def around_text(self, index: int) -> tuple[bytes, bytes] | None:
        """Before and after the text of the open block's delta."""
        return (self._before, _AFTER) if self._open == "text" else None

    def closing(self, usage: Usage, timing: dict[str, object] | None) -> bytes:
        """The last block's end, why it ended, and the tokens."""
        delta = {"stop_reason": self._stop[0], "stop_sequence": self._stop[1]}
        return (
            self._close()
            + _event("message_delta", {"delta": delta, "usage": _usage(usage).model_dump()})
            + _event("message_stop", {})
        )

    def failure(self, error: TandemError) -> bytes:
        """An error event."""
        return b"event: error\ndata: " + orjson.dumps(anthropic_error(error.message, error.http_status)) + b"\n\n"

    def _piece(self, kind: str, text: str) -> list[bytes]:
        """More of a block, which begins if it is none of the open one's kind."""
        begin = b"" if self._open == kind else self._close() + self._begin(kind)
        return [begin, self._before, orjson.dumps(text), _AFTER]

    def _begin(self, kind: str, **fields: object) -> bytes:
        index, self._open = self._num_blocks, kind
        name, field = _DELTAS[kind]
        self._before = (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{"type":"%b","%b":'
            % (index, name.encode(), field.encode())
        )
        self._num_blocks += 1
        empty: object = {} if kind == "tool_use" else ""
        block = _block(kind, **fields, **{"input" if kind == "tool_use" else kind: empty})
        return _event("content_block_start", {"index": index, "content_block": block})

    def _close(self) -> bytes:
        was_open, self._open = self._open, ""
        return _event("content_block_stop", {"index": self._num_blocks - 1}) if was_open else b""

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


def _block(kind: str, **fields: object) -> dict[str, object]:
    if kind == "tool_use":
        return {"type": kind, "id": f"toolu_{secrets.token_hex(12)}", **fields}
    return {"type": kind, **fields, **({"signature": ""} if kind == "thinking" else {})}


def _object(arguments: str) -> object:
    """A call's arguments; what a limit cut off in the middle stays as text."""
    try:
        return orjson.loads(arguments or "{}")
    except orjson.JSONDecodeError:
        return {"partial_json": arguments}


def _stop(finish_reason: str | None, stop_reason: str | int | None) -> tuple[str, str | None]:
    if finish_reason == "length":
        return "max_tokens", None
    if finish_reason == "tool_calls":
        return "tool_use", None
    return ("stop_sequence", stop_reason) if isinstance(stop_reason, str) else ("end_turn", None)


def _usage(usage: Usage) -> MessageUsage:
    cached = usage.cached_tokens
    return MessageUsage(
        input_tokens=usage.prompt_tokens - cached, output_tokens=usage.completion_tokens, cache_read_input_tokens=cached
    )


def _event(kind: str, content: dict[str, object]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps({"type": kind, **content}))
