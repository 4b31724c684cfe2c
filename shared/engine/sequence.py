"""One generation as the engine sees it.

The unifying idea: a sequence has tokens, and `num_computed_tokens` of them have KV. Every step lets that number catch
up by some amount; prefill, chunked prefill, decode and recompute after preemption differ only in how far it lags.

             acquire()               schedule()
    WAITING_FOR_KV -------> WAITING ----------> RUNNING -------> FINISHED
                               ^------- preempt ---'
"""

from __future__ import annotations

import enum
import itertools
import time
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from shared.engine.output_guide import OutputGuide
from shared.engine.sampling_params import SamplingParams
from shared.identity import BlockHash, BlockId, SequenceId, SessionId

PENDING_TOKEN = -1
"""Stands in `token_ids` for a token that a step in flight samples; only ever the last one."""

_sequence_ids = itertools.count(1)


class SequenceStatus(enum.Enum):
    """Where a sequence stands."""

    WAITING_FOR_KV = "waiting_for_kv"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(enum.Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    SEALED = "sealed"  # prefill only: every full block asked for is sealed
    POOLED = "pooled"  # its hidden states are pooled
    ABORTED = "aborted"


class Pooling(enum.Enum):
    """Which tokens' final hidden states make up a sequence's vector."""

    LAST = "last"
    MEAN = "mean"


def next_sequence_id() -> SequenceId:
    """A number that is unique in this process."""
    return SequenceId(next(_sequence_ids))


@dataclass(slots=True, eq=False)
class Sequence:
    """The engine's mutable record of one generation. The scheduler owns it; the runner only reads it.

    Attributes:
        session_id: Of the gateway; choices of one session are separate sequences that share prompt blocks by hash.
        choice: Index of this choice in the session; part of the noise key.
        token_ids: Prompt and output tokens so far. The list is this sequence's own.
        num_prompt_tokens: How many of them are the prompt.
        sampling: None for a prefill-only sequence, which ends when `num_prompt_tokens` tokens are computed and sealed.
        namespace: Root of the hash chain.
        tenant: Whose it is; see `fair_share`.
        block_hashes: Names of the full blocks, as far as they were computed; always a prefix of the chain.
        block_table: Cache blocks by logical block index. Blocks `[0, num_sealed_blocks)` are sealed and in the index.
        borrows_tail: The last block of `block_table` is to be copied before more is written: see `copy_on_write`.
        keeps_blocks: When it ends by itself it keeps its blocks, for sequences that branch off it, until `release`.
        num_computed_tokens: Tokens whose KV is in `block_table`.
        num_cached_tokens: Prompt tokens that were not computed for this sequence here: found in the cache or fetched.
        priority: Lower runs sooner.
        pooling: None, or the sequence samples nothing and ends when its tokens' hidden states are pooled.
        pooled: Sum of the hidden states that count, of `num_pooled_tokens` tokens; float64 `[hidden]`.
        num_pooled_tokens: For `MEAN`, whose tokens are all computed here, even where their KV is cached.
        guide: Says which tokens may come; None = all. Required where `sampling.is_guided`.
        num_prompt_logprobs: None, or how many alternatives to each prompt token are wanted with its log-probability.
        num_scored_tokens: Prompt tokens whose successors were scored; such a prompt is computed here, from the first
            token that was not, even where its KV is cached.
        arrival_s, first_scheduled_s: `time.monotonic()`; the latter 0 until scheduled.
    """

    session_id: SessionId
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams | None
    namespace: BlockHash
    choice: int = 0
    priority: int = 0
    tenant: str = ""
    sequence_id: SequenceId = field(default_factory=next_sequence_id)
    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: FinishReason | None = None
    stop_token_id: int = -1
    block_hashes: list[BlockHash] = field(default_factory=list)
    block_table: list[BlockId] = field(default_factory=list)
    num_sealed_blocks: int = 0
    borrows_tail: bool = False
    keeps_blocks: bool = False
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    arrival_s: float = field(default_factory=time.monotonic)
    first_scheduled_s: float = 0.0
    pooling: Pooling | None = None
    pooled: npt.NDArray[np.float64] | None = None
    num_pooled_tokens: int = 0
    guide: OutputGuide | None = None
    num_prompt_logprobs: int | None = None
    num_scored_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """How far the KV lags behind the tokens."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def decodes(self) -> bool:
        """Only its last token, known or pending, has no KV yet."""
        return len(self.token_ids) - self.num_computed_tokens == 1

    @property
    def is_complete(self) -> bool:
        """The last token it may have is being sampled."""
        sampling = self.sampling
        is_pending = self.token_ids[-1] == PENDING_TOKEN
        return is_pending and sampling is not None and self.num_output_tokens >= sampling.max_tokens

    def forget_pending_tokens(self) -> None:
        """Removes the place of a token whose step no longer matters."""
        while self.token_ids and self.token_ids[-1] == PENDING_TOKEN:
            self.token_ids.pop()

    @property
    def is_prefill_only(self) -> bool:
        """Ends when its prompt is sealed; nothing is sampled."""
        return self.sampling is None

    def add_pooled(self, total: npt.NDArray[np.float64], num_tokens: int) -> None:
        """Adds hidden states to the pool."""
        self.pooled = total if self.pooled is None else self.pooled + total
        self.num_pooled_tokens += num_tokens

    @property
    def is_scoring(self) -> bool:
        """Log-probabilities of its prompt are wanted and not complete."""
        return self.num_prompt_logprobs is not None and self.num_scored_tokens < self.num_prompt_tokens - 1

    @property
    def is_finished(self) -> bool:
        """No further step will touch it."""
        return self.status is SequenceStatus.FINISHED
