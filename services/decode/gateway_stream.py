"""One `Generate` call: a gateway's commands in, one message per engine step out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection

import structlog

from protos import worker_pb2 as pb
from services.decode.beam_session import BeamSession
from services.decode.beams import Beam
from services.decode.greeting import check_hello
from services.decode.routes import Routes
from services.decode.session import DecodeSession
from services.decode.wire import logprobs_to_wire, prompt_scores_to_wire
from shared.engine.sequence import FinishReason, Sequence
from shared.engine.step import PromptScores, TokenLogprobs
from shared.errors import (
    InternalError,
    InvalidRequest,
    RequestTimeout,
    TandemError,
    WorkerDraining,
    WorkerLost,
)
from shared.identity import SessionId
from shared.worker.process import WorkerParts

log = structlog.get_logger(__name__)


class GatewayStream:
    """The sessions that one gateway has on this worker. They all end when the stream does.

    Args:
        routes: Of the servicer, shared by its streams: which stream and session a sequence belongs to.
    """

    def __init__(self, parts: WorkerParts, routes: Routes) -> None:
        self._parts = parts
        self._routes = routes
        self._sessions: dict[SessionId, DecodeSession] = {}
        self._step = pb.StepOutput()  # what the current step has for this gateway, but for its tokens
        self._numbers: list[int] = []  # of the sequences that have the current step's tokens
        self._token_ids: list[int] = []
        self._outgoing: asyncio.Queue[pb.StepOutput | None] = asyncio.Queue()
        self.gateway_id = ""

    def greet(self, command: pb.GenerateCommand) -> None:
        """Checks that the gateway means this life of this worker.

        Raises:
            InvalidRequest: The first command is not a Hello.
            StaleIncarnation: It means an earlier life.
            FingerprintMismatch: It means another model or layout.
        """
        self.gateway_id = check_hello(command, self._parts.status.identity)

    async def read(self, commands: AsyncIterator[pb.GenerateCommand]) -> None:
        """Carries out commands until the gateway ends its side."""
        try:
            async for command in commands:
                match command.WhichOneof("command"):
                    case "submit":
                        self._submit(command.submit)
                    case "abort":
                        self._abort(SessionId(command.abort.session_id), command.abort.sequences)
                    case other:
                        log.warning("command_ignored", command=other, gateway_id=self.gateway_id)
        finally:
            self.end()

    async def messages(self) -> AsyncIterator[pb.StepOutput]:
        """Yields each step's message; ends with the stream."""
        while (message := await self._outgoing.get()) is not None:
            yield message

    def close(self) -> None:
        """Aborts whatever the gateway left behind."""
        for session_id in list(self._sessions):
            self._abort(session_id)

    def hand_back(self) -> int:
        """Gives every session up, for another worker to go on with; returns how many there were."""
        error = WorkerDraining(f"worker {self._parts.status.identity.worker_id} is draining")
        sessions = list(self._sessions.values())
        for session in sessions:
            self.fail(session, error)
        return len(sessions)

    def end(self) -> None:
        """Ends the call as soon as everything was sent."""
        self._outgoing.put_nowait(None)

    def add_token(
        self, session: DecodeSession, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None
    ) -> None:
        """Adds one token to the current step's message.

        Raises:
            InternalError: The session could not have one yet.
        """
        session.note_token(sequence)
        if not session.has_started:
            session.has_started = True
            self._step.started.append(session.started_message())
        if logprobs is not None:
            self._step.logprobs.append(logprobs_to_wire(len(self._token_ids), logprobs))
        self._numbers.append(session.first_sequence + sequence.choice)
        self._token_ids.append(token_id)

    def add_prompt_scores(self, session: DecodeSession, scores: PromptScores) -> None:
        """Adds what is known of a prompt's own tokens."""
        self._step.prompt_scores.append(prompt_scores_to_wire(session.number_of(scores.sequence), scores))

    def add_finish(self, session: DecodeSession, sequence: Sequence) -> None:
        """Adds the end of one choice. A choice that the engine gave up on its own fails the session."""
        if sequence.finish_reason is FinishReason.ABORTED and not session.was_stopped(sequence):
            worker_id = self._parts.status.identity.worker_id
            self.fail(session, WorkerLost(f"worker {worker_id} stopped"))
            return
        if sequence.guide is not None and sequence.guide.error:
            self.fail(session, InvalidRequest(sequence.guide.error))
            return
        self._step.finishes.append(session.finish_message(sequence))
        session.finish(sequence)
        self._routes.pop(sequence.sequence_id, None)
        if session.is_over:
            self._sessions.pop(session.session_id, None)

    def flush(self) -> None:
        """Sends the current step's message."""
        step, self._step = self._step, pb.StepOutput()
        step.sequences.extend(self._numbers)
        step.token_ids.extend(self._token_ids)
        self._numbers.clear()
        self._token_ids.clear()
        self._outgoing.put_nowait(step)

    def fail(self, session: DecodeSession, error: TandemError) -> None:
        """Ends a session with an error, at once and only once."""
        if self._sessions.pop(session.session_id, None) is None:
            return
        self._drop(session)
        self._send_failure(session.session_id, error)

    def _send_failure(self, session_id: SessionId, error: TandemError) -> None:
        failure = pb.Failure(session_id=session_id, code=error.code, message=error.message)
        self._outgoing.put_nowait(pb.StepOutput(failures=[failure]))

    def _submit(self, submit: pb.Submit) -> None:
        session_id = SessionId(submit.session_id)
        try:
            if self._parts.status.is_draining:
                raise WorkerDraining(f"worker {self._parts.status.identity.worker_id} is draining")
            if session_id in self._sessions:
                raise InvalidRequest(f"session {session_id} is already running")
            session = self._new_session(submit)
            if not session.must_be_guided:
                self._parts.engine.submit(session.sequences)
        except TandemError as exc:
            self._send_failure(session_id, exc)
            return
        self._sessions[session_id] = session
        for sequence in session.sequences:
            self._routes[sequence.sequence_id] = (session if isinstance(session, BeamSession) else self, session)
        if submit.timeout_s > 0:
            error = RequestTimeout(f"not finished within the request's {submit.timeout_s:g} s")
            session.deadline = asyncio.get_running_loop().call_later(submit.timeout_s, self.fail, session, error)
        session.acquisition = asyncio.create_task(self._acquire(session))

    def _new_session(self, submit: pb.Submit) -> DecodeSession:
        if submit.sampling.beam_width:
            return BeamSession(self._parts, submit, self._routes, self._deliver_beams, self.fail)
        return DecodeSession(self._parts, submit)

    def _deliver_beams(self, session: BeamSession, beams: list[Beam]) -> None:
        """Sends the best beams as the session's choices, whole, and ends it."""
        if self._sessions.pop(session.session_id, None) is None:
            return
        session.end()
        step = pb.StepOutput(started=[session.started_message()])
        for number in range(session.num_choices):
            beam = beams[number] if number < len(beams) else Beam()
            for token_id, logprobs in zip(beam.token_ids, beam.logprobs, strict=True):
                if session.returns_logprobs:
                    step.logprobs.append(logprobs_to_wire(len(step.token_ids), logprobs))
                step.sequences.append(session.first_sequence + number)
                step.token_ids.append(token_id)
            step.finishes.append(session.beam_finish_message(number, beam))
        self._outgoing.put_nowait(step)

    async def _acquire(self, session: DecodeSession) -> None:
        try:
            if session.must_be_guided:
                await session.prepare_guides()
                self._parts.engine.submit(session.sequences)
            await session.acquire_kv()
        except TandemError as exc:
            self.fail(session, exc)
        except Exception as exc:
            log.exception("acquisition_failed", session_id=session.session_id)
            self.fail(session, InternalError(f"KV acquisition failed: {type(exc).__name__}"))

    def _abort(self, session_id: SessionId, choices: Collection[int] = ()) -> None:
        """Ends some choices, which get their last word, or without any named the whole session, which gets none."""
        session = self._sessions.get(session_id)
        if session is None:
            return
        if choices:
            self._parts.engine.abort(session.stop_choices(choices))
        else:
            del self._sessions[session_id]
            self._drop(session)

    def _drop(self, session: DecodeSession) -> None:
        for sequence in session.sequences:
            self._routes.pop(sequence.sequence_id, None)
        self._parts.engine.abort(session.end())
