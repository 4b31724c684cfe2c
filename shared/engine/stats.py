"""What an engine says about itself: for `/ready`, the worker record and the metrics."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from shared.engine.block_pool import BlockCounts
from shared.engine.neighbour_slowdown import NeighbourSlowdown
from shared.engine.sequence import Sequence
from shared.engine.step import StepBatch

_MEASURE_EVERY = 16  # steps; counting distinct blocks costs about as much as scheduling a step
_RATE_DECAY = 0.9  # per step with a prompt chunk


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot.

    Attributes:
        blocks: Pool by state.
        oldest_pin_s: For how long the block that is pinned longest has been; 0.0 if none is.
        running, waiting, waiting_for_kv: Sequences.
        queued_prefill_tokens: Tokens to compute before everything present decodes.
        steps: Forward passes so far.
        last_step_s: Duration of the last one.
        last_progress_s: `time.monotonic()` of the last completed step; now, while there is nothing to do. Stands still
            if the engine hangs or nothing that waits can be given room.
        used_slots, allocated_slots: Token slots of running sequences, summed over every 16th step: their rates give the
            utilization over any span.
        preemptions: Times that a running sequence yielded.
        prefix_query_tokens, prefix_hit_tokens: Prompt tokens of started sequences; those of them not computed here.
        prefill_tokens_per_s: Recent speed of steps that were mainly prefill; 0.0 before any.
        neighbour_slowdown: See `NeighbourSlowdown`; 1.0 before any.
        prefilled_tokens: Tokens computed in chunks so far: prompts, and what is computed again after a preemption.
        generated_tokens: Tokens sampled so far.
        failure: Why the engine stopped by itself; "" if it did not.
    """

    blocks: BlockCounts
    oldest_pin_s: float
    running: int
    waiting: int
    waiting_for_kv: int
    queued_prefill_tokens: int
    steps: int
    last_step_s: float
    last_progress_s: float
    used_slots: int
    allocated_slots: int
    preemptions: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    prefill_tokens_per_s: float
    neighbour_slowdown: float
    prefilled_tokens: int
    generated_tokens: int
    failure: str

    @property
    def slot_utilization(self) -> float:
        """Used / allocated token slots since the start; 1.0 before any."""
        return self.used_slots / self.allocated_slots if self.allocated_slots else 1.0


def slot_usage(running: Seq[Sequence], block_size: int) -> tuple[int, int]:
    """`(used, allocated)` token slots: computed tokens, and slots of the blocks that hold them.

    A block that several sequences share counts once on either side. Shared blocks are sealed, hence full, so only
    slots at the end of a sequence's own last block are unused.
    """
    blocks: set[int] = set()
    num_unused = 0
    for sequence in running:
        blocks.update(sequence.block_table)
        num_unused += len(sequence.block_table) * block_size - sequence.num_computed_tokens
    allocated = len(blocks) * block_size
    return allocated - num_unused, allocated


class StepMeter:
    """Accumulates over steps what `EngineStats` reports. Guarded by the engine's lock."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._rate_tokens = 0.0
        self._rate_s = 0.0
        self._slowdown = NeighbourSlowdown()
        self.steps = 0
        self.last_step_s = 0.0
        self.prefilled_tokens = 0
        self.generated_tokens = 0
        self.used_slots = 0
        self.allocated_slots = 0

    def record(self, batch: StepBatch, seconds: float, running: Seq[Sequence], *, is_beside: bool) -> int:
        """Counts one completed step.

        Args:
            batch: It computed.
            seconds: It took.
            running: Sequences that run on after it.
            is_beside: Some sequence waits for KV from elsewhere.

        Returns:
            Tokens computed.
        """
        chunks = [entry.num_new_tokens for entry in batch.scheduled if entry.num_new_tokens > 1]
        num_prefilled = sum(chunks)
        self.prefilled_tokens += num_prefilled
        self.generated_tokens += len([True for entry in batch.scheduled if entry.samples])
        num_single = len(batch.scheduled) - len(chunks)
        if num_prefilled > num_single:  # most tokens are of chunks
            self._rate_tokens = _RATE_DECAY * self._rate_tokens + num_prefilled
            self._rate_s = _RATE_DECAY * self._rate_s + seconds
        if num_single and not chunks:
            self._slowdown.observe(seconds, num_single, is_beside=is_beside)
        if self.steps % _MEASURE_EVERY == 0:
            used, allocated = slot_usage(running, self._block_size)
            self.used_slots += used
            self.allocated_slots += allocated
        self.steps += 1
        self.last_step_s = seconds
        return num_prefilled + num_single

    @property
    def neighbour_slowdown(self) -> float:
        """See `NeighbourSlowdown.factor`."""
        return self._slowdown.factor

    @property
    def prefill_tokens_per_s(self) -> float:
        """Decaying ratio of prompt tokens to seconds."""
        return self._rate_tokens / self._rate_s if self._rate_s else 0.0
