"""Replies of `/v1/completions`."""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from services.gateway.choice_text import Delta, TokenEntry
from services.gateway.generation import Usage
from services.gateway.logprobs import completion_logprobs
from services.gateway.replies import DONE, CollectedChoice, openai_failure, usage_block
from services.gateway.request import GenerationRequest
from services.gateway.stream_chunks import ChunkTemplate
from shared.errors import TandemError
from shared.tokenization.tokenizer import Tokenizer


class CompletionReply:
    """`text_completion`, whole or in chunks.

    Args:
        echoes: Per choice the text to begin with: the prompt if `echo` was asked for, else "".
    """

    def __init__(self, request: GenerationRequest, echoes: Sequence[str], model: str, tokenizer: Tokenizer) -> None:
        self._head = {
            "id": request.request_id,
            "object": "text_completion",
            "created": request.created,
            "model": model,
        }
        self._echoes = echoes
        self._tokenizer = tokenizer
        self._has_logprobs = request.sampling.num_logprobs is not None
        self._has_usage = request.include_usage
        self._chunks = ChunkTemplate(self._head, _choice, has_usage=request.include_usage)

    def whole(self, choices: Sequence[CollectedChoice], usage: Usage, timing: dict[str, object] | None) -> bytes:
        """The JSON body of a reply that is not streamed."""
        body: dict[str, object] = {
            **self._head,
            "choices": [self._whole_choice(choice) for choice in choices],
            "usage": usage_block(usage),
        }
        if timing is not None:
            body["timing"] = timing
        return orjson.dumps(body)

    def opening(self) -> bytes:
        """The prompts, where they are echoed."""
        return b"".join(self._chunks.text(index, echo) for index, echo in enumerate(self._echoes) if echo)

    def events(self, deltas: Sequence[Delta]) -> bytes:
        """The chunks of one batch of deltas."""
        pieces: list[bytes] = []
        for delta in deltas:
            if delta.tokens:
                choice = _choice(delta.index, delta.text)
                choice["logprobs"] = self._logprobs(delta.tokens, delta.index)
                pieces.append(self._chunks.choice(choice))
            elif delta.text:
                pieces.append(self._chunks.text(delta.index, delta.text))
            if delta.finish_reason is not None:
                last = _choice(delta.index, "", delta.finish_reason)
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
            **_choice(choice.index, self._echoes[choice.index] + choice.text, choice.finish_reason),
            "logprobs": self._logprobs(choice.tokens, choice.index) if self._has_logprobs else None,
            "stop_reason": choice.stop_reason,
        }

    def _logprobs(self, tokens: Sequence[TokenEntry], index: int) -> dict[str, object]:
        return completion_logprobs(tokens, self._tokenizer, text_offset=len(self._echoes[index]))


def _choice(index: int, text: str, finish_reason: str | None = None) -> dict[str, object]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
