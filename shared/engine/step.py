"""What passes between scheduler, runner and the outside in one engine step.

    schedule() -> StepBatch -> ModelRunner.execute() -> StepResult -> scheduler.update() -> StepOutputs -> on_step()

Nothing else passes: the scheduler knows no tensors, the runner no queues.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from shared.engine.sequence import PENDING_TOKEN, Sequence
from shared.identity import BlockHash, BlockId


@dataclass(slots=True)  # as all that every step makes, not frozen: that makes it three times as slow to make
class ScheduledSequence:
    """Compute the KV of tokens `[num_computed, num_computed + num_new_tokens)` of a sequence in this step.

    Never changed once made.

    Attributes:
        num_computed: `sequence.num_computed_tokens` when the step was scheduled.
        samples: The step reaches the sequence's last token, so its logits are wanted and one token is sampled.
    """

    sequence: Sequence
    num_computed: int
    num_new_tokens: int
    samples: bool

    @classmethod
    def next_of(cls, sequence: Sequence, num_new_tokens: int) -> Self:
        """The sequence's next tokens."""
        reaches_end = num_new_tokens == sequence.num_uncomputed_tokens
        return cls(sequence, sequence.num_computed_tokens, num_new_tokens, reaches_end and not sequence.is_prefill_only)

    @property
    def end(self) -> int:
        """Index of the first token that the step does not compute, hence of the one that it samples."""
        return self.num_computed + self.num_new_tokens

    def assume(self) -> int:
        """Counts the step as computed in the sequence, one that it samples as pending. Idempotent; returns `end`."""
        sequence, end = self.sequence, self.num_computed + self.num_new_tokens
        if sequence.num_computed_tokens < end:
            sequence.num_computed_tokens = end
            if self.samples:
                sequence.token_ids.append(PENDING_TOKEN)
        return end


class BlockCopy(NamedTuple):
    """Bytes to copy from one cache block to another."""

    source: BlockId
    destination: BlockId


@dataclass(slots=True)
class StepBatch:
    """One forward pass. Sequences that decode come first, then prefill chunks. Never changed once made.

    Attributes:
        copies: To be made before anything is written; no destination is a source.
        unwanted: Other than 0 once every sequence in it is to be aborted: a runner that takes one step at a time may
            then end it early.
    """

    scheduled: list[ScheduledSequence]
    copies: list[BlockCopy] = field(default_factory=list)
    unwanted: ctypes.c_int32 = field(default_factory=ctypes.c_int32)

    @property
    def num_tokens(self) -> int:
        """Tokens computed in the step."""
        return sum(s.num_new_tokens for s in self.scheduled)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of one sampled token and of the likeliest ones, descending."""

    logprob: float
    top_token_ids: list[int]
    top_logprobs: list[float]


@dataclass(frozen=True, slots=True)
class PooledTokens:
    """What a step pools of a sequence: hidden states of tokens `[start, end)`, added up, float64 `[hidden]`."""

    sequence: Sequence
    start: int
    end: int
    total: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Log-probabilities of the next tokens of a sequence's prompt that were not scored yet; one entry per token.

    Attributes:
        ranks: 1 for the likeliest token.
        top_token_ids, top_logprobs: The likeliest ones, descending.
    """

    sequence: Sequence
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    top_token_ids: list[list[int]] = field(default_factory=list)
    top_logprobs: list[list[float]] = field(default_factory=list)


@dataclass(slots=True)
class StepResult:
    """What the runner returns. Its owner alone changes it.

    Attributes:
        token_ids: One per scheduled sequence that samples, in batch order.
        logprobs: Likewise; None where the sequence asked for none.
        pooled: Of scheduled sequences that pool.
        prompt_scores: Of scheduled sequences that want their prompts scored.
        was_given_up: It ended early, because it was unwanted: its blocks hold nothing, and there is nothing else here.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    pooled: list[PooledTokens] = field(default_factory=list)
    prompt_scores: list[PromptScores] = field(default_factory=list)
    was_given_up: bool = False


@dataclass(slots=True)
class StepFigures:
    """What a step took.

    Attributes:
        seconds: From its start, or the end of the one before it if that was later, to its end.
        num_tokens: Computed in it.
    """

    seconds: float
    num_tokens: int


@dataclass(slots=True)
class StepOutputs:
    """All that one step changed, for the event loop; the receiver owns it.

    Attributes:
        tokens: Sampled tokens in order: sequence, token id, log-probabilities if asked for.
        finished: Sequences that ended in this step, after their tokens; also aborted ones.
        prefilled: Prefill-only sequences that progressed; `sequence.num_sealed_blocks` says how far.
        sealed: Blocks that became sealed, with the step or by a fetch since the last one.
        evicted: Blocks that left the index.
        prompt_scores: Of prompts, in order; all of a sequence's come before its first token.
        step: Of the step; None for what changed between two steps.
    """

    tokens: list[tuple[Sequence, int, TokenLogprobs | None]] = field(default_factory=list)
    finished: list[Sequence] = field(default_factory=list)
    prefilled: list[Sequence] = field(default_factory=list)
    sealed: list[BlockHash] = field(default_factory=list)
    evicted: list[BlockHash] = field(default_factory=list)
    prompt_scores: list[PromptScores] = field(default_factory=list)
    step: StepFigures | None = None

    @property
    def is_empty(self) -> bool:
        """Nothing changed."""
        return not (self.tokens or self.finished or self.prefilled or self.sealed or self.evicted or self.prompt_scores)
