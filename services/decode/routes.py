"""Where an engine's outputs go: which reader and which session a sequence belongs to."""

from __future__ import annotations

from typing import Protocol

from services.decode.session import DecodeSession
from shared.engine.sequence import Sequence
from shared.engine.step import PromptScores, TokenLogprobs
from shared.errors import TandemError
from shared.identity import SequenceId


class StepReader(Protocol):
    """Takes what a step has for the sequences of a session."""

    def add_prompt_scores(self, session: DecodeSession, scores: PromptScores) -> None:
        """More of a prompt was scored."""
        ...

    def add_token(
        self, session: DecodeSession, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None
    ) -> None:
        """A token was sampled."""
        ...

    def add_finish(self, session: DecodeSession, sequence: Sequence) -> None:
        """A sequence ended."""
        ...

    def fail(self, session: DecodeSession, error: TandemError) -> None:
        """The session cannot go on."""
        ...

    def flush(self) -> None:
        """That was all of the step."""
        ...


Routes = dict[SequenceId, tuple[StepReader, DecodeSession]]
