"""Replies of `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from services.gateway.choice_text import Delta
from services.gateway.generation import Usage
from services.gateway.logprobs import chat_logprobs
from services.gateway.replies import DONE, CollectedChoice, openai_failure, usage_block
from services.gateway.request import GenerationRequest
from services.gateway.stream_chunks import ChunkTemplate
from shared.errors import TandemError
from shared.tokenization.tokenizer import Tokenizer


class ChatReply:
    """`chat.completion`, and `chat.completion.chunk` when streamed."""

    def __init__(self, request: GenerationRequest, num_choices: int, model: str, tokenizer: Tokenizer) -> None:
        self._head = {"id": request.request_id, "created": request.created, "model": model}
        self._num_choices = num_choices
        self._tokenizer = tokenizer
        self._has_logprobs = request.sampling.num_logprobs is not None
        self._has_usage = request.include_usage
        head = {**self._head, "object": "chat.completion.chunk"}
        self._chunks = ChunkTemplate(head, _text_choice, has_usage=request.include_usage)

    def whole(self, choices: Sequence[CollectedChoice], usage: Usage, timing: dict[str, object] | None) -> bytes:
        """The JSON body of a reply that is not streamed."""
        body: dict[str, object] = {
            **self._head,
            "object": "chat.completion",
            "choices": [self._whole_choice(choice) for choice in choices],
            "usage": usage_block(usage),
        }
        if timing is not None:
            body["timing"] = timing
        return orjson.dumps(body)

    def opening(self) -> bytes:
        """Says who speaks, per choice."""
        delta: dict[str, object] = {"role": "assistant", "content": ""}
        return b"".join(self._chunks.choice(_chunk_choice(index, delta)) for index in range(self._num_choices))

    def events(self, deltas: Sequence[Delta]) -> bytes:
        """The chunks of one batch of deltas."""
        pieces: list[bytes] = []
        for delta in deltas:
            if delta.tokens:
                choice = _text_choice(delta.index, delta.text)
                choice["logprobs"] = chat_logprobs(delta.tokens, self._tokenizer)
                pieces.append(self._chunks.choice(choice))
            elif delta.text:
                pieces.append(self._chunks.text(delta.index, delta.text))
            if delta.finish_reason is not None:
                last = _chunk_choice(delta.index, {}, delta.finish_reason)
                pieces.append(self._chunks.choice({**last, "stop_reason": delta.stop_reason}))
        return b"".join(pieces)

    def closing(self, usage: Usage, timing: dict[str, object] | None) -> bytes:
        """Usage and timing if asked for, and the end mark."""
        extra: dict[str, object] = {"usage": usage_block(usage)} if self._has_usage else {}
        if timing is not None:
            extra["timing"] = timing
        return (self._chunks.ending(extra) if extra else b"") + DONE

    def failure(self, error: TandemError) -> bytes:
        """An error event."""
        return openai_failure(error)

    def _whole_choice(self, choice: CollectedChoice) -> dict[str, object]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": chat_logprobs(choice.tokens, self._tokenizer) if self._has_logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }


def _chunk_choice(index: int, delta: dict[str, object], finish_reason: str | None = None) -> dict[str, object]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _text_choice(index: int, text: str) -> dict[str, object]:
    return _chunk_choice(index, {"content": text})
