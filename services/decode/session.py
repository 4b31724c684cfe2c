"""One session on a decode worker: its choices' sequences, where their KV came from, and the timeline.

submitted -> KV acquired -> choices generate -> each choice finishes -> session over
     `------ abort, timeout, failure or hand-back ends it from anywhere ---'

A session that comes from another worker brings the tokens that it generated there: they are outputs like any other.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Collection, Iterable

from protos import worker_pb2 as pb
from services.decode.wire import FINISH_REASONS, sampling_from_wire
from shared.engine.admission import check_token_ids
from shared.engine.sampling_params import MAX_CHOICES, SamplingParams
from shared.engine.sequence import Sequence, SequenceStatus
from shared.errors import ContextLengthExceeded, InvalidRequest
from shared.identity import TOKEN_BYTES, BlockHash, SequenceId, SessionId, namespace_hash, unpack_tokens
from shared.worker.kv_acquisition import AcquisitionReport
from shared.worker.kv_state import KvEvent, KvState, new_kv_life
from shared.worker.process import WorkerParts
from shared.worker.status import WorkerIdentity

_MAX_SEQUENCES = 1 << 32  # numbers travel as uint32
_MAX_TIMEOUT_S = 1e6


class DecodeSession:
    """Owned by its gateway stream, on the event loop.

    Attributes:
        sequences: One per unfinished choice, in order; sequence number of choice c is `first_sequence + c`. The first
            one gets the prompt's KV for all.
        acquisition: The task that fetches KV; None before `start`.
    """

    def __init__(self, parts: WorkerParts, submit: pb.Submit) -> None:
        """Builds the sequences.

        Raises:
            InvalidRequest: Empty prompt, token ids outside the vocabulary, too many choices, nothing left to generate.
        """
        who = parts.status.identity
        prompt = _checked_prompt(submit.prompt_tokens, who)
        _check(submit, who)
        sampling = sampling_from_wire(submit.sampling)
        self._sampling = sampling
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
        self.has_started = False
        self.sequences = _sequences(submit, prompt, sampling, namespace_hash(who.fingerprint, submit.cache_salt))
        self._unfinished = {sequence.sequence_id: new_kv_life() for sequence in self.sequences}
        for sequence in self.sequences:
            if sequence.status is SequenceStatus.WAITING:
                self._unfinished[sequence.sequence_id].apply(KvEvent.SHARE)
        self._stopped: set[SequenceId] = set()

    @property
    def is_over(self) -> bool:
        """Every choice finished."""
        return not self._unfinished

    def number_of(self, sequence: Sequence) -> int:
        """The stream-wide number that the gateway gave this choice."""
        return self.first_sequence + sequence.choice

    @property
    def must_be_guided(self) -> bool:
        """`prepare_guides` must come before the engine gets the sequences."""
        return self._sampling.is_guided

    async def prepare_guides(self) -> None:
        """Gives every choice what says which tokens may come.

        Raises:
            InvalidRequest: The grammar is wrong or too complex.
        """
        guides = await self._parts.guides.prepare(self._sampling, len(self.sequences))
        for sequence, guide in zip(self.sequences, guides, strict=True):
            sequence.guide = guide

    async def acquire_kv(self) -> None:
        """Gets KV from wherever it is: the first choice's, then what the others have beyond the prompt."""
        first, *others = self.sequences
        self.report = AcquisitionReport()
        await self._acquire(first, self._submit.holders, self._submit.prefill_candidates, self.report)
        self.acquired_s = time.monotonic()
        self._parts.observe(self.report)
        await asyncio.gather(
            *(
                self._acquire(other, self._submit.resumed[other.choice].holders, (), AcquisitionReport())
                for other in others
                if other.status is SequenceStatus.WAITING_FOR_KV
            )
        )

    async def _acquire(
        self,
        sequence: Sequence,
        holders: Iterable[pb.HolderHint],
        prefill_candidates: Iterable[pb.PeerRef],
        report: AcquisitionReport,
    ) -> None:
        """Holds as much of one sequence's KV as can be had, then lets the scheduler have it."""
        life = self._unfinished.get(sequence.sequence_id)
        if life is None:
            return  # stopped meanwhile
        wanted = (sequence.num_tokens - 1) // self._parts.status.identity.block_size
        hashes = sequence.block_hashes[:wanted]  # the engine named them when it admitted the sequence
        if sequence.is_scoring:  # only computing gives the logits of a prompt
            life.apply(KvEvent.SHARE)
            self._parts.engine.ready_for_schedule(sequence)
            return
        acquisition = self._parts.acquisition(sequence, hashes, self._submit.cache_salt, life, report)
        await acquisition.run(list(holders), list(prefill_candidates))
        if life.state is KvState.SEARCHING:  # else it ended meanwhile
            life.apply(KvEvent.ACQUIRE)
            self._parts.engine.ready_for_schedule(sequence)

    def note_token(self, sequence: Sequence) -> None:
        """A token of that sequence was sampled.

        Raises:
            InternalError: Before its KV was acquired.
        """
        life = self._unfinished.get(sequence.sequence_id)
        if life is not None and life.state is not KvState.GENERATING:
            life.apply(KvEvent.TOKEN)

    def stop_choices(self, numbers: Collection[int]) -> list[SequenceId]:
        """The gateway has what it wants of some choices; returns the sequences that the engine must abort."""
        stopped = [s.sequence_id for s in self.sequences if self.number_of(s) in numbers]
        self._stopped.update(stopped)
        return stopped

    def was_stopped(self, sequence: Sequence) -> bool:
        """Its abort was the gateway's wish."""
        return sequence.sequence_id in self._stopped

    def finish(self, sequence: Sequence) -> None:
        """A choice ended at the engine."""
        if life := self._unfinished.pop(sequence.sequence_id, None):
            life.apply(KvEvent.END)
        if not self._unfinished:
            self.end()

    def end(self) -> list[SequenceId]:
        """Stops what the session still has going; returns the sequences that the engine must abort."""
        if self.deadline:
            self.deadline.cancel()
        if self.acquisition and not self.acquisition.done():
            self.acquisition.cancel()
        unfinished, self._unfinished = self._unfinished, {}
        for life in unfinished.values():
            life.apply(KvEvent.END)
        return list(unfinished)

    def started_message(self) -> pb.Started:
        """What goes out with the first token."""
        return pb.Started(session_id=self.session_id, cached_tokens=self._cached_tokens(self.sequences[0]))

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
        cached = min(sequence.num_cached_tokens, sequence.num_prompt_tokens)
        return max(0, cached - computed_remotely * block_size)

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


def _sequences(submit: pb.Submit, prompt: list[int], sampling: SamplingParams, namespace: BlockHash) -> list[Sequence]:
    """One per choice that is not finished."""
    resumed = submit.resumed or [pb.ResumedChoice()] * submit.num_choices
    has_begun = any(progress.output_token_ids for progress in resumed)  # scores come before the first token
    open_choices = [choice for choice, progress in enumerate(resumed) if not progress.is_finished]
    return [
        Sequence(
            session_id=SessionId(submit.session_id),
            token_ids=prompt + list(resumed[choice].output_token_ids),
            num_prompt_tokens=len(prompt),
            sampling=sampling,
            namespace=namespace,
            choice=choice,
            priority=submit.priority,
            tenant=submit.tenant,
            num_prompt_logprobs=None if position or has_begun else sampling.num_prompt_logprobs,
            # Later choices wait for the first one's prompt inside the scheduler and then share its blocks; those that
            # have outputs look for the KV of these themselves.
            status=SequenceStatus.WAITING
            if position and not resumed[choice].output_token_ids
            else SequenceStatus.WAITING_FOR_KV,
        )
        for position, choice in enumerate(open_choices)
    ]


def _checked_prompt(packed: bytes, who: WorkerIdentity) -> list[int]:
    num_tokens = len(packed) // TOKEN_BYTES
    if num_tokens > who.max_model_len:
        raise ContextLengthExceeded(f"the prompt has {num_tokens} tokens, the context length is {who.max_model_len}")
    try:
        prompt = unpack_tokens(packed)
    except ValueError as exc:
        raise InvalidRequest(str(exc), param="prompt") from exc
    check_token_ids(prompt, who.vocab_size)
    return prompt


def _check(submit: pb.Submit, who: WorkerIdentity) -> None:
    """Before anything is built of it: a submission may claim more than any memory holds."""
    if not 1 <= submit.num_choices <= MAX_CHOICES:
        raise InvalidRequest(f"n is {submit.num_choices}, must be in [1, {MAX_CHOICES}]", param="n")
    if submit.first_sequence + submit.num_choices > _MAX_SEQUENCES:
        raise InvalidRequest(f"sequence numbers end at {_MAX_SEQUENCES}: {submit.first_sequence} is too high")
    if not math.isfinite(submit.timeout_s) or submit.timeout_s > _MAX_TIMEOUT_S:
        raise InvalidRequest(f"timeout_s is {submit.timeout_s}, must be in [0, {_MAX_TIMEOUT_S}]", param="timeout")
    _check_resumed(submit, who.vocab_size)


def _check_resumed(submit: pb.Submit, vocab_size: int) -> None:
    if len(submit.resumed) not in (0, submit.num_choices):
        raise InvalidRequest(f"{len(submit.resumed)} resumed choices of {submit.num_choices}")
    for choice in submit.resumed:
        num_tokens, limit = len(choice.output_token_ids), submit.sampling.max_tokens
        if num_tokens >= limit and not choice.is_finished:
            raise InvalidRequest(f"a resumed choice has {num_tokens} tokens, max_tokens is {limit}")
        if choice.output_token_ids:
            check_token_ids(choice.output_token_ids, vocab_size)
    if submit.resumed and all(choice.is_finished for choice in submit.resumed):
        raise InvalidRequest("every resumed choice is finished")
