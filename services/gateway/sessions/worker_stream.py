"""One `Generate` stream to one decode worker, carrying every session that this gateway has there.

    CONNECTING --accepted--> OPEN --peer or network gone--> ENDED     (a new stream is a new object)

The only module of the gateway that sees protobuf.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence

import grpc
import structlog

from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from services.gateway.embeddings.call import EmbedCall
from services.gateway.sessions.placement import Holder
from services.gateway.sessions.session import (
    Choice,
    Finish,
    FinishReason,
    PromptScore,
    Session,
    Timeline,
    TokenLogprobs,
)
from shared.cancellation import is_being_cancelled
from shared.directory.records import WorkerRecord
from shared.engine.sampling_params import SamplingParams
from shared.engine.thinking import Thinking
from shared.errors import TandemError, WorkerLost, error_from_code
from shared.identity import SessionId
from shared.metrics.tally import Tally
from shared.rpc import PeerRole, TlsFiles, error_from_rpc, open_channel
from shared.rpc.silence import until_unresponsive

log = structlog.get_logger(__name__)

_Call = grpc.aio.StreamStreamCall[pb.GenerateCommand, pb.StepOutput]

_FINISH_REASONS = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_ABORT: FinishReason.ABORT,
}


class WorkerStream:
    """Made by `open`; ended by `close` or by the peer. When it ends, every session on it fails as `WorkerLost`."""

    def __init__(self, record: WorkerRecord, channel: grpc.aio.Channel, call: _Call, token_gap_s: Tally) -> None:
        self.record = record
        self._token_gap_s = token_gap_s
        self._channel = channel
        self._stub = rpc.WorkerStub(channel)
        self._call = call
        self._commands: asyncio.Queue[pb.GenerateCommand] = asyncio.Queue()
        self._first_sequence = 0
        self._routes: dict[int, Choice] = {}
        self._sessions: dict[SessionId, tuple[Session, int]] = {}  # with the number of its first choice
        self._is_open = True
        self._num_embeddings = 0
        self._heard_s = time.monotonic()
        self._unresponsive: WorkerLost | None = None

    @classmethod
    async def open(
        cls, record: WorkerRecord, gateway_id: str, timeout_s: float, token_gap_s: Tally, tls: TlsFiles | None = None
    ) -> WorkerStream:
        """Connects and waits until the worker accepted this gateway.

        Raises:
            StaleIncarnation, FingerprintMismatch: The process at that address is not the one that the record means.
            WorkerLost: Nobody answers.
        """
        channel = open_channel(record.address, tls=tls, peer=(PeerRole(record.role), record.worker_id))
        call = rpc.WorkerStub(channel).Generate()
        hello = pb.Hello(gateway_id=gateway_id, incarnation=record.incarnation, fingerprint=record.fingerprint)
        try:
            async with asyncio.timeout(timeout_s):
                await call.write(pb.GenerateCommand(hello=hello))
                accepted = await call.read()
            if accepted is grpc.aio.EOF:
                raise error_from_rpc(await _end_of(call))
        except (grpc.aio.AioRpcError, TandemError, TimeoutError, asyncio.CancelledError) as exc:
            call.cancel()
            await channel.close()
            if isinstance(exc, grpc.aio.AioRpcError):
                raise error_from_rpc(exc) from exc
            if isinstance(exc, TimeoutError):
                raise WorkerLost(f"worker {record.worker_id} did not answer within {timeout_s:g} s") from exc
            raise
        return cls(record, channel, call, token_gap_s)

    @property
    def is_open(self) -> bool:
        """Sessions can be submitted."""
        return self._is_open

    @property
    def num_sessions(self) -> int:
        """Sessions that were submitted and have not ended."""
        return len(self._sessions)

    def submit(
        self,
        session: Session,
        *,
        holders: Mapping[int, Sequence[Holder]],
        cache_salt: str,
        priority: int,
        timeout_s: float,
    ) -> None:
        """Queues the session for the worker, as far as it has come; its choices get what comes back.

        Args:
            session: Its placement says which holders the first unfinished choice's tokens have.
            holders: Of other choices that have come further than the prompt, by index.
            cache_salt: Part of the name of its blocks.
            priority: Lower is sooner.
            timeout_s: 0 = none.

        Raises:
            WorkerLost: The stream has ended.
        """
        if not self._is_open:
            raise WorkerLost(f"worker {self.record.worker_id} is gone")
        self._note_asked()
        first = self._first_sequence
        self._first_sequence += len(session.choices)
        for choice in session.choices:
            self._routes[first + choice.index] = choice
        self._sessions[session.attempt_id] = session, first
        command = pb.GenerateCommand()
        _fill_submit(command.submit, session, first, holders)
        submit = command.submit
        submit.cache_salt, submit.priority, submit.timeout_s = cache_salt, priority, timeout_s
        submit.tenant = session.tenant
        self._commands.put_nowait(command)

    async def embed(self, call: EmbedCall, timeout_s: float) -> bytes:
        """Vectors of a call's inputs, float32, one after the other.

        Raises:
            TandemError: The worker refuses, or is lost.
        """
        request = pb.EmbedRequest(
            session_id=call.call_id,
            incarnation=self.record.incarnation,
            inputs=[pb.EmbedInput(token_ids=token_ids) for token_ids in call.inputs],
            pooling=pb.Pooling.Value(f"POOLING_{call.pooling.upper()}"),
            normalize=call.normalize,
            dimensions=call.dimensions,
            cache_salt=call.cache_salt,
            priority=call.priority,
        )
        self._note_asked()
        self._num_embeddings += 1
        try:
            reply = await self._stub.Embed(request, timeout=timeout_s or None)
        except grpc.aio.AioRpcError as exc:
            raise error_from_rpc(exc) from exc
        except asyncio.CancelledError:
            if self._is_open or is_being_cancelled():
                raise
            # Closing the channel of a worker that is gone cancels its calls; nobody cancelled this request.
            raise WorkerLost(f"worker {self.record.worker_id} was lost") from None
        finally:
            self._num_embeddings -= 1
        return reply.vectors

    def abort(self, session: Session) -> None:
        """Ends a session; nothing of it arrives any more. Does nothing when it has ended already."""
        if self._forget(session.attempt_id):
            self._commands.put_nowait(pb.GenerateCommand(abort=pb.Abort(session_id=session.attempt_id)))

    def abort_choices(self, session: Session, choices: Iterable[Choice]) -> None:
        """Ends some choices of a session. Each still gets its `Finish`, and whatever was on its way."""
        entry = self._sessions.get(session.attempt_id)
        if entry is not None:
            sequences = [entry[1] + choice.index for choice in choices]
            abort = pb.Abort(session_id=session.attempt_id, sequences=sequences)
            self._commands.put_nowait(pb.GenerateCommand(abort=abort))

    def give_up_all(self, error: TandemError) -> None:
        """Ends every session for the worker, which may still be there, and fails it with `error`."""
        for session_id in self._sessions:
            self._commands.put_nowait(pb.GenerateCommand(abort=pb.Abort(session_id=session_id)))
        self._fail_all(error)

    async def run(self) -> None:
        """Carries commands and outputs until the stream ends; returns then, and every session left has failed."""
        helpers = asyncio.create_task(self._write()), asyncio.create_task(self._watch())
        error: TandemError = WorkerLost(f"worker {self.record.worker_id} ended the stream")
        try:
            while isinstance(output := await self._call.read(), pb.StepOutput):  # else it is the end
                self._dispatch(output)
        except grpc.aio.AioRpcError as exc:
            error = WorkerLost(f"worker {self.record.worker_id} was lost: {error_from_rpc(exc).message}")
        except asyncio.CancelledError:
            if self._unresponsive is None or is_being_cancelled():
                raise
        finally:
            self._is_open = False
            for helper in helpers:
                helper.cancel()
            self._fail_all(self._unresponsive or error)
            self._call.cancel()
            await self._channel.close()

    async def _write(self) -> None:
        """One writer: gRPC allows no two writes at a time."""
        try:
            while True:
                await self._call.write(await self._commands.get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            self._call.cancel()  # wakes the reader, which tells the sessions

    def _note_asked(self) -> None:
        """Its silence counts from now, unless it is already awaited."""
        if not self._is_awaited:
            self._heard_s = time.monotonic()

    @property
    def _is_awaited(self) -> bool:
        return bool(self._sessions or self._num_embeddings)

    async def _watch(self) -> None:
        """Ends the stream of a worker that owes sessions something and answers nothing."""
        said = await until_unresponsive(self._stub, lambda: self._heard_s if self._is_awaited else time.monotonic())
        self._unresponsive = WorkerLost(f"worker {self.record.worker_id} {said}")
        log.warning("worker_unresponsive", worker_id=self.record.worker_id, sessions=len(self._sessions))
        self._call.cancel()

    def _dispatch(self, output: pb.StepOutput) -> None:
        """All that one engine step produced, in one pass."""
        routes, gaps, now_s = self._routes, self._token_gap_s, time.monotonic()
        self._heard_s = now_s
        sequences = output.sequences
        for started in output.started:
            if entry := self._sessions.get(SessionId(started.session_id)):
                entry[0].note_started(started.cached_tokens)
        for sequence, token_id in zip(sequences, output.token_ids, strict=True):
            if choice := routes.get(sequence):
                if choice.pushed_s:
                    gaps.observe(now_s - choice.pushed_s, now_s)
                choice.pushed_s = now_s
                choice.push(token_id)
        for scores in output.prompt_scores:
            if choice := routes.get(scores.sequence):
                choice.session.note_prompt_scores(_prompt_scores_from_wire(scores))
        for logprobs in output.logprobs:
            if choice := routes.get(sequences[logprobs.index]):
                choice.push_logprobs(_logprobs_from_wire(logprobs))
        for finish in output.finishes:
            self._finish(finish)
        for failure in output.failures:
            if session := self._forget(SessionId(failure.session_id)):
                session.lose(error_from_code(failure.code, failure.message))

    def _finish(self, finish: pb.Finish) -> None:
        choice = self._routes.pop(finish.sequence, None)
        if choice is None:
            return
        choice.end(_finish_from_wire(finish))
        choice.session.note_choice_ended()
        if not choice.session.unfinished_choices:
            self._sessions.pop(choice.session.attempt_id, None)

    def _forget(self, session_id: SessionId) -> Session | None:
        entry = self._sessions.pop(session_id, None)
        if entry is None:
            return None
        session, first = entry
        for choice in session.choices:
            self._routes.pop(first + choice.index, None)
        return session

    def _fail_all(self, error: TandemError) -> None:
        for session_id in list(self._sessions):
            if session := self._forget(session_id):
                session.lose(error)


async def _end_of(call: _Call) -> grpc.aio.AioRpcError:
    """How a call ended that ended early, as the error that reading it would raise."""
    return grpc.aio.AioRpcError(
        code=await call.code(),
        initial_metadata=grpc.aio.Metadata(),
        trailing_metadata=grpc.aio.Metadata(*await call.trailing_metadata()),
        details=await call.details(),
    )


def _fill_submit(
    submit: pb.Submit, session: Session, first_sequence: int, holders: Mapping[int, Sequence[Holder]]
) -> None:
    """In its place inside the command: a message that is put into another one is copied, long prompt and all."""
    placement = session.placement
    assert placement is not None
    submit.session_id, submit.first_sequence, submit.num_choices = (
        session.attempt_id,
        first_sequence,
        len(session.choices),
    )
    submit.prompt_tokens = session.packed_prompt
    submit.sampling.CopyFrom(_sampling_to_wire(session.sampling))
    submit.prefill_candidates.extend(
        pb.PeerRef(worker_id=worker.worker_id, incarnation=worker.incarnation)
        for worker in placement.prefill_candidates
    )
    submit.holders.extend(map(_holder_to_wire, placement.holders))
    if len(session.unfinished_choices) < len(session.choices) or session.has_output:
        submit.resumed.extend(
            pb.ResumedChoice(
                output_token_ids=choice.token_ids,
                is_finished=choice.finish is not None,
                holders=map(_holder_to_wire, holders.get(choice.index, ())),
            )
            for choice in session.choices
        )


def _holder_to_wire(holder: Holder) -> pb.HolderHint:
    record = holder.record
    return pb.HolderHint(
        holder=pb.PeerRef(worker_id=record.worker_id, incarnation=record.incarnation), num_blocks=holder.num_blocks
    )


def _sampling_to_wire(sampling: SamplingParams) -> pb.SamplingParams:
    return pb.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=sampling.logit_bias,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        stop_token_ids=sorted(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        num_logprobs=sampling.num_logprobs,
        allowed_token_ids=(
            None if sampling.allowed_token_ids is None else pb.TokenIds(ids=sorted(sampling.allowed_token_ids))
        ),
        bad_words=[pb.TokenIds(ids=word) for word in sampling.bad_words],
        grammar=sampling.grammar,
        thinking=None if sampling.thinking is None else _thinking_to_wire(sampling.thinking),
        num_prompt_logprobs=sampling.num_prompt_logprobs,
        beam_width=sampling.beam_width,
        length_penalty=sampling.length_penalty,
    )


def _thinking_to_wire(thinking: Thinking) -> pb.Thinking:
    return pb.Thinking(
        start_id=thinking.start_id,
        end_ids=thinking.end_ids,
        is_open=thinking.is_open,
        max_tokens=thinking.max_tokens,
    )


def _prompt_scores_from_wire(wire: pb.PromptScores) -> list[PromptScore]:
    top_ids, top_logprobs, width = wire.top_token_ids, wire.top_logprobs, wire.num_top
    return [
        PromptScore(
            TokenLogprobs(
                logprob,
                tuple(top_ids[i * width : (i + 1) * width]),
                tuple(top_logprobs[i * width : (i + 1) * width]),
            ),
            rank,
        )
        for i, (logprob, rank) in enumerate(zip(wire.logprobs, wire.ranks, strict=True))
    ]


def _logprobs_from_wire(wire: pb.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(wire.logprob, tuple(wire.top_token_ids), tuple(wire.top_logprobs))


def _finish_from_wire(wire: pb.Finish) -> Finish:
    spent = wire.timeline
    return Finish(
        reason=_FINISH_REASONS.get(wire.reason, FinishReason.ABORT),
        stop_token_id=wire.stop_token_id,
        cached_tokens=wire.cached_tokens,
        output_tokens=wire.output_tokens,
        timeline=Timeline(
            queued_s=spent.queued_s,
            prefill_s=spent.prefill_s,
            fetch_s=spent.fetch_s,
            verify_s=spent.verify_s,
            first_step_s=spent.first_step_s,
            first_token_s=spent.first_token_s,
            last_token_s=spent.last_token_s,
            fetched_bytes=spent.fetched_bytes,
            local_blocks=spent.local_blocks,
            fetched_blocks=spent.fetched_blocks,
            missed_blocks=spent.missed_blocks,
            prefill_worker=spent.prefill_worker,
            mode=spent.mode,
        ),
    )
