"""Replies of `/v1/completions`."""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from services.gateway.replies.choice_text import Delta, TokenEntry
from services.gateway.replies.logprobs import TokenNames, completion_logprobs, echoed_logprobs, prompt_logprobs
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
from shared.errors import TandemError
from shared.tokenization.tokenizer import Tokenizer


class CompletionReply:
    """`text_completion`, whole or in chunks."""

    def __init__(
        self, request: GenerationRequest, sessions: Sequence[Session], model: str, tokenizer: Tokenizer
    ) -> None:
        self._request = request
        self._sessions = sessions
        self._head = {
            "id": request.request_id,
            "object": "text_completion",
            "created": request.created,
            "model": model,
        }
        self._names = TokenNames(tokenizer, by_id=request.names_tokens_by_id)
        self._echoes = [self._echo(session, tokenizer) for session in sessions]  # per prompt
        self._chunks = ChunkTemplate(self._head, _choice, has_usage=request.include_usage)
        prompt_tokens = sum(session.num_prompt_tokens for session in sessions)
        self._usage = UsageSoFar(prompt_tokens) if request.continuous_usage else None

    def whole(self, choices: Sequence[CollectedChoice], usage: Usage, timing: dict[str, object] | None) -> bytes:
        """The JSON body of a reply that is not streamed."""
        body: dict[str, object] = {
            **self._head,
            "choices": [self._whole_choice(choice, number) for number, choice in enumerate(self._best(choices))],
            "usage": usage_block(usage),
        }
        if timing is not None:
            body["timing"] = timing
        return orjson.dumps(body)

    def opening(self) -> bytes:
        """The prompts, where they are echoed, and their tokens, where they are wanted."""
        if not self._request.echo and not self._request.returns_token_ids:
            return b""
        num_choices = len(self._sessions) * self._request.num_choices
        return b"".join(self._chunks.choice(self._opening_choice(index)) for index in range(num_choices))

    def events(self, deltas: Sequence[Delta]) -> bytes:
        """The chunks of one batch of deltas."""
        pieces: list[bytes] = []
        for delta in deltas:
            extra = {"usage": self._usage.add(delta)} if self._usage is not None else None
            if delta.tokens or delta.token_ids or (extra and delta.text):
                choice = _choice(delta.index, delta.text)
                if delta.tokens and self._request.returns_logprobs:
                    choice["logprobs"] = self._logprobs(delta.tokens, delta.index)
                if delta.token_ids:
                    choice["token_ids"] = delta.token_ids
                pieces.append(self._chunks.choice(choice, extra))
            elif delta.text:
                pieces.append(self._chunks.text(delta.index, delta.text))
            if delta.finish_reason is not None:
                last = _choice(delta.index, "", delta.finish_reason)
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

    def _best(self, choices: Sequence[CollectedChoice]) -> list[CollectedChoice]:
        """Of every prompt's choices those that the client gets, the likeliest per token first if there are more."""
        made, returned = self._request.num_choices, self._request.num_returned
        if made == returned:
            return list(choices)
        best: list[CollectedChoice] = []
        for first in range(0, len(choices), made):
            ranked = list(choices[first : first + made])
            if not self._request.sampling.beam_width:  # beams come ranked
                ranked.sort(key=lambda choice: -choice.mean_logprob)
            best += ranked[:returned]
        return best

    def _whole_choice(self, choice: CollectedChoice, number: int) -> dict[str, object]:
        session, echo = self._of(choice.index)
        whole = {
            **_choice(number, echo + choice.text, choice.finish_reason),
            "logprobs": self._whole_logprobs(choice, session) if self._request.returns_logprobs else None,
            "stop_reason": choice.stop_reason,
        }
        if self._request.sampling.num_prompt_logprobs is not None:
            whole["prompt_logprobs"] = prompt_logprobs(session, self._names)
        if self._request.returns_token_ids:
            whole["prompt_token_ids"], whole["token_ids"] = session.prompt_token_ids, choice.token_ids
        return whole

    def _opening_choice(self, index: int) -> dict[str, object]:
        session, echo = self._of(index)
        choice = _choice(index, echo)
        if self._request.echo and self._request.returns_logprobs:
            choice["logprobs"] = echoed_logprobs(session, self._names)
        if self._request.returns_token_ids:
            choice["prompt_token_ids"] = session.prompt_token_ids
        return choice

    def _whole_logprobs(self, choice: CollectedChoice, session: Session) -> dict[str, object]:
        prompt = echoed_logprobs(session, self._names) if self._request.echo else None
        return self._logprobs(choice.tokens, choice.index, prompt)

    def _logprobs(
        self, tokens: Sequence[TokenEntry], index: int, prompt: dict[str, list[object]] | None = None
    ) -> dict[str, object]:
        return completion_logprobs(tokens, self._names, text_offset=len(self._of(index)[1]), prompt=prompt)

    def _of(self, index: int) -> tuple[Session, str]:
        """The session of a choice, and what its text begins with."""
        position = index // self._request.num_choices
        return self._sessions[position], self._echoes[position]

    def _echo(self, session: Session, tokenizer: Tokenizer) -> str:
        if not self._request.echo:
            return ""
        return tokenizer.decode(session.prompt_token_ids, skip_special_tokens=self._request.skip_special_tokens)


def _choice(index: int, text: str, finish_reason: str | None = None) -> dict[str, object]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
