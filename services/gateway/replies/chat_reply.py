"""Replies of `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from services.gateway.replies.choice_text import Delta
from services.gateway.replies.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from services.gateway.replies.reply_format import (
    CollectedChoice,
    UsageSoFar,
    openai_closing,
    openai_failure,
    usage_block,
)
from services.gateway.replies.stream_chunks import ChunkTemplate
from services.gateway.requests.request import GenerationRequest
from services.gateway.sessions.generation import Usage
from services.gateway.sessions.session import Session
from services.gateway.syntax.families import ToolFamily
from shared.errors import TandemError
from shared.tokenization.tokenizer import Tokenizer

REASONING_NAMES = ("reasoning_content", "reasoning")
"""What clients look for it under: the name that DeepSeek's API has, and vLLM's newer one."""


class ChatReply:
    """`chat.completion`, and `chat.completion.chunk` when streamed."""

    def __init__(
        self, request: GenerationRequest, sessions: Sequence[Session], model: str, tokenizer: Tokenizer
    ) -> None:
        self._request = request
        self._session = sessions[0]
        self._head = {"id": request.request_id, "created": request.created, "model": model}
        self._num_choices = sum(len(session.choices) for session in sessions)
        self._names = TokenNames(tokenizer, by_id=request.names_tokens_by_id)
        head = {**self._head, "object": "chat.completion.chunk"}
        self._chunks = ChunkTemplate(head, _text_choice, has_usage=request.include_usage)
        self._usage = UsageSoFar(self._session.num_prompt_tokens) if request.continuous_usage else None

    def whole(self, choices: Sequence[CollectedChoice], usage: Usage, timing: dict[str, object] | None) -> bytes:
        """The JSON body of a reply that is not streamed."""
        body: dict[str, object] = {
            **self._head,
            "object": "chat.completion",
            "choices": [self._whole_choice(choice) for choice in choices],
            "usage": usage_block(usage),
        }
        if self._request.sampling.num_prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs(self._session, self._names)
        if self._request.returns_token_ids:
            body["prompt_token_ids"] = self._session.prompt_token_ids
        if timing is not None:
            body["timing"] = timing
        return orjson.dumps(body)

    def opening(self) -> bytes:
        """Says who speaks, per choice."""
        delta: dict[str, object] = {"role": "assistant", "content": ""}
        extra = {"prompt_token_ids": self._session.prompt_token_ids} if self._request.returns_token_ids else None
        return b"".join(self._chunks.choice(_chunk_choice(index, delta), extra) for index in range(self._num_choices))

    def events(self, deltas: Sequence[Delta]) -> bytes:
        """The chunks of one batch of deltas."""
        pieces: list[bytes] = []
        for delta in deltas:
            extra = {"usage": self._usage.add(delta)} if self._usage is not None else None
            if delta.tokens or delta.reasoning or delta.calls or delta.token_ids or (extra and delta.text):
                pieces.append(self._chunks.choice(self._full_choice(delta), extra))
            elif delta.text:
                pieces.append(self._chunks.text(delta.index, delta.text))
            if delta.finish_reason is not None:
                last = _chunk_choice(delta.index, {}, delta.finish_reason)
                pieces.append(self._chunks.choice({**last, "stop_reason": delta.stop_reason}, extra))
        return b"".join(pieces)

    def around_text(self, index: int) -> tuple[bytes, bytes] | None:
        """Before and after the text of a chunk."""
        return self._chunks.around_text(index) if self._usage is None else None

    def closing(self, usage: Usage, timing: dict[str, object] | None) -> bytes:
        """Usage and timing if asked for, and the end mark."""
        return openai_closing(self._chunks, usage if self._request.include_usage else None, timing)

    def failure(self, error: TandemError) -> bytes:
        """An error event."""
        return openai_failure(error)

    def _full_choice(self, delta: Delta) -> dict[str, object]:
        """A chunk's choice that carries more than text."""
        content: dict[str, object] = {}
        if delta.reasoning:
            content |= dict.fromkeys(REASONING_NAMES, delta.reasoning)
        if delta.text or not (delta.reasoning or delta.calls):
            content["content"] = delta.text
        if delta.calls:
            content["tool_calls"] = [
                {"index": piece.index, "function": {"arguments": piece.arguments}}
                if piece.name is None
                else {"index": piece.index, **self._call(piece.name, piece.arguments)}
                for piece in delta.calls
            ]
        choice = _chunk_choice(delta.index, content)
        if delta.tokens and self._request.returns_logprobs:
            choice["logprobs"] = chat_logprobs(delta.tokens, self._names)
        if delta.token_ids:
            choice["token_ids"] = delta.token_ids
        return choice

    def _whole_choice(self, choice: CollectedChoice) -> dict[str, object]:
        message: dict[str, object] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.reasoning:
            message |= dict.fromkeys(REASONING_NAMES, "".join(choice.reasoning))
        if choice.calls:
            message["content"] = choice.text or None
            message["tool_calls"] = [self._call(call.name, call.arguments) for call in choice.calls]
        whole: dict[str, object] = {
            "index": choice.index,
            "message": message,
            "logprobs": chat_logprobs(choice.tokens, self._names) if self._request.returns_logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._request.returns_token_ids:
            whole["token_ids"] = choice.token_ids
        return whole

    def _call(self, name: str, arguments: str) -> dict[str, object]:
        syntax = self._request.syntax
        family = (syntax.tools if syntax is not None else None) or ToolFamily.HERMES
        return {"id": family.new_call_id(), "type": "function", "function": {"name": name, "arguments": arguments}}


def _chunk_choice(index: int, delta: dict[str, object], finish_reason: str | None = None) -> dict[str, object]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _text_choice(index: int, text: str) -> dict[str, object]:
    return _chunk_choice(index, {"content": text})
