"""What the endpoints' replies have in common. One `ReplyFormat` per endpoint shapes what a `Generation` produced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from services.gateway.replies.choice_text import Delta, TokenEntry
from services.gateway.replies.error_reply import error_body
from services.gateway.replies.stream_chunks import ChunkTemplate
from services.gateway.sessions.generation import Generation, Usage
from shared.errors import TandemError

DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class CollectedCall:
    """A tool call, put together; `arguments` is JSON."""

    name: str
    arguments: str = ""


@dataclass(slots=True)
class CollectedChoice:
    """A choice whose deltas were put together."""

    index: int
    pieces: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[CollectedCall] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    tokens: list[TokenEntry] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def add(self, delta: Delta) -> None:
        """Appends what a delta tells."""
        self.pieces.append(delta.text)
        self.tokens += delta.tokens
        if delta.reasoning:
            self.reasoning.append(delta.reasoning)
        self.token_ids += delta.token_ids
        for piece in delta.calls:
            if piece.name is not None:
                self.calls.append(CollectedCall(piece.name))
            self.calls[-1].arguments += piece.arguments
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces)

    @property
    def mean_logprob(self) -> float:
        """Of its tokens; 0 for none."""
        return sum(entry.logprobs.logprob for entry in self.tokens) / max(1, len(self.tokens))


class ReplyFormat(Protocol):
    """An endpoint's reply, whole or as server-sent events. Made for one request."""

    def whole(self, choices: Sequence[CollectedChoice], usage: Usage, timing: dict[str, object] | None) -> bytes:
        """The JSON body of a reply that is not streamed."""
        ...

    def opening(self) -> bytes:
        """The events before the first delta; may be empty."""
        ...

    def events(self, deltas: Sequence[Delta]) -> bytes:
        """The events of one batch of deltas."""
        ...

    def around_text(self, index: int) -> tuple[bytes, bytes] | None:
        """What comes before and after the text, as JSON, in an event that tells of nothing but a choice's text.

        None if events tell more; asked after a choice's first event.
        """
        ...

    def closing(self, usage: Usage, timing: dict[str, object] | None) -> bytes:
        """The events after the last delta, `[DONE]` included."""
        ...

    def failure(self, error: TandemError) -> bytes:
        """The last events of a stream that failed after it began."""
        ...


def openai_closing(chunks: ChunkTemplate, usage: Usage | None, timing: dict[str, object] | None) -> bytes:
    """A chunk with what was asked for, if anything was, and the end mark."""
    extra: dict[str, object] = {} if usage is None else {"usage": usage_block(usage)}
    if timing is not None:
        extra["timing"] = timing
    return (chunks.ending(extra) if extra else b"") + DONE


def openai_failure(error: TandemError) -> bytes:
    """OpenAI's error event and end mark."""
    return b"data: " + error_body(error) + b"\n\n" + DONE


async def collect(generation: Generation) -> list[CollectedChoice]:
    """Reads a generation to its end.

    Raises:
        TandemError: It failed.
    """
    choices = [CollectedChoice(index) for index in range(generation.num_choices)]
    async for deltas in generation.batches():
        for delta in deltas:
            choices[delta.index].add(delta)
    return choices


def usage_block(usage: Usage) -> dict[str, object]:
    """`usage`."""
    block: dict[str, object] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
    if usage.reasoning_tokens is not None:
        block["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    return block


class UsageSoFar:
    """Counts along with a stream, for readers who want every chunk to tell."""

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._num_tokens: dict[int, int] = {}

    def add(self, delta: Delta) -> dict[str, object]:
        """`usage` after this delta."""
        self._num_tokens[delta.index] = delta.num_tokens
        completion_tokens = sum(self._num_tokens.values())
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self._prompt_tokens + completion_tokens,
        }
