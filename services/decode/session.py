"""One session on a decode worker: its choices' sequences, where their KV came from, and the timeline.

submitted -> KV acquired -> choices generate -> each choice finishes -> session over
     `------------- abort, timeout or failure ends it from anywhere -------'
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection

from protos import worker_pb2 as pb
from services.decode.wire import FINISH_REASONS, sampling_from_wire
from shared.engine.sequence import Sequence, SequenceStatus
from shared.errors import InvalidRequest
from shared.identity import SequenceId, SessionId, namespace_hash
from shared.worker.kv_acquisition import AcquisitionReport
from shared.worker.process import WorkerParts

MAX_CHOICES = 128


class DecodeSession:
    """Owned by its gateway stream, on the event loop.

    Attributes:
        sequences: One per choice, in order; sequence number of choice c is `first_sequence + c`.
        acquisition: The task that fetches KV; None before `start`.
    """

    def __init__(self, parts: WorkerParts, submit: pb.Submit) -> None:
        """Builds the sequences.

        Raises:
            InvalidRequest: Empty prompt, token ids outside the vocabulary, too many choices.
        """
        who = parts.status.identity
        _check(submit, who.vocab_size)
        sampling = sampling_from_wire(submit.sampling)
        prompt = list(submit.prompt_token_ids)
        namespace = namespace_hash(who.fingerprint, submit.cache_salt)
        self._parts = parts
        self._submit = submit
        self.session_id = SessionId(submit.session_id)
        self.first_sequence = submit.first_sequence
        self.received_s = time.monotonic()
        self.first_token_s = 0.0
        self.report = AcquisitionReport()
        self.acquired_s = 0.0
        self.acquisition: asyncio.Task[None] | None = None
        self.deadline: asyncio.TimerHandle | None = None
        self.sequences = [
            Sequence(
                session_id=self.session_id,
                token_ids=list(prompt) if choice else prompt,
                num_prompt_tokens=len(prompt),
                sampling=sampling,
                namespace=namespace,
                choice=choice,
                priority=submit.priority,
                # Later choices wait for the first one's prompt inside the scheduler and then share its blocks.
                status=SequenceStatus.WAITING if choice else SequenceStatus.WAITING_FOR_KV,
            )
            for choice in range(submit.num_choices)
        ]
        self._unfinished = {sequence.sequence_id for sequence in self.sequences}
        self._stopped: set[SequenceId] = set()

    @property
    def is_over(self) -> bool:
        """Every choice finished."""
        return not self._unfinished

    def number_of(self, sequence: Sequence) -> int:
        """The stream-wide number that the gateway gave this choice."""
        return self.first_sequence + sequence.choice

    async def acquire_kv(self) -> None:
        """Gets the prompt's KV from wherever it is, then lets the scheduler have the first choice."""
        first, block_size = self.sequences[0], self._parts.status.identity.block_size
        wanted = (first.num_prompt_tokens - 1) // block_size
        hashes = first.block_hashes[:wanted]  # the engine named them when it admitted the sequence
        acquisition = self._parts.acquisition(first, hashes, self._submit.cache_salt)
        self.report = acquisition.report
        await acquisition.run(self._submit.holders, self._submit.prefill_candidates)
        self.acquired_s = time.monotonic()
        self._parts.observe(self.report)
        self._parts.engine.ready_for_schedule(first)

    def stop_choices(self, numbers: Collection[int]) -> list[SequenceId]:
        """The gateway has what it wants of some choices; returns the sequences that the engine must abort."""
        stopped = [s.sequence_id for s in self.sequences if self.number_of(s) in numbers]
        self._stopped.update(stopped)
        return stopped

    def was_stopped(self, sequence: Sequence) -> bool:
        """Its abort was the gateway's wish."""
        return sequence.sequence_id in self._stopped

    def finish(self, sequence: Sequence) -> None:
        """Notes that a choice ended."""
        self._unfinished.discard(sequence.sequence_id)
        if self.is_over:
            self.end()

    def end(self) -> list[SequenceId]:
        """Stops what the session still has going; returns the sequences that the engine must abort."""
        if self.deadline:
            self.deadline.cancel()
        if self.acquisition and not self.acquisition.done():
            self.acquisition.cancel()
        unfinished = list(self._unfinished)
        self._unfinished.clear()
        return unfinished

    def finish_message(self, sequence: Sequence) -> pb.Finish:
        """The last word on one choice."""
        assert sequence.finish_reason is not None
        return pb.Finish(
            sequence=self.number_of(sequence),
            reason=FINISH_REASONS[sequence.finish_reason],
            stop_token_id=sequence.stop_token_id,
            prompt_tokens=sequence.num_prompt_tokens,
            cached_tokens=self._cached_tokens(sequence),
            output_tokens=sequence.num_output_tokens,
            timeline=self._timeline(sequence),
        )

    def _cached_tokens(self, sequence: Sequence) -> int:
        """Prompt tokens nobody computed for this request: what the prefill worker did compute is not cached."""
        report, block_size = self.report, self._parts.status.identity.block_size
        before = report.local_blocks + report.held_blocks
        computed_remotely = max(0, report.prefilled_blocks - max(0, report.prefill_cached_blocks - before))
        return max(0, sequence.num_cached_tokens - computed_remotely * block_size)

    def _timeline(self, sequence: Sequence) -> pb.Timeline:
        report, received_s = self.report, self.received_s
        scheduled_s = sequence.first_scheduled_s or received_s
        return pb.Timeline(
            queued_s=max(0.0, scheduled_s - (self.acquired_s or received_s)),
            prefill_s=report.prefill_s,
            fetch_s=report.fetch_s,
            first_step_s=scheduled_s - received_s,
            first_token_s=self.first_token_s - received_s if self.first_token_s else 0.0,
            last_token_s=time.monotonic() - received_s,
            fetched_bytes=report.fetched_bytes,
            local_blocks=report.local_blocks,
            fetched_blocks=report.held_blocks + report.prefilled_blocks,
            missed_blocks=report.missed_blocks,
            prefill_worker=report.prefill_worker,
            verify_s=report.verify_s,
            mode=report.mode,
        )


def _check(submit: pb.Submit, vocab_size: int) -> None:
    if not submit.prompt_token_ids:
        raise InvalidRequest("the prompt has no tokens", param="prompt")
    low, high = min(submit.prompt_token_ids), max(submit.prompt_token_ids)
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise InvalidRequest(f"token id {bad} is outside the vocabulary [0, {vocab_size})", param="prompt")
    if not 1 <= submit.num_choices <= MAX_CHOICES:
        raise InvalidRequest(f"n is {submit.num_choices}, must be in [1, {MAX_CHOICES}]", param="n")
