"""A request under way: its sessions, and the one place where what they produce comes together.

Everything a client can see of a generation goes through `batches`, so streaming and collecting cannot differ; only what
is text and nothing else may go to a stream past it, by a line per choice (`replies/direct_line`). A worker that is lost
on the way is not among it: the session goes on at another worker, from the next token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial

import structlog

from services.gateway.access.admission import Ticket
from services.gateway.metrics import RequestMetrics
from services.gateway.replies.choice_text import ChoiceText, Delta, Reading
from services.gateway.requests.request import GenerationRequest
from services.gateway.sessions.dispatcher import Dispatcher
from services.gateway.sessions.session import Choice, Failure, Finish, FinishReason, Mailbox, Session
from services.gateway.sessions.session_state import SessionState
from services.gateway.sessions.workers import Workers
from shared.errors import InternalError, Overloaded, RequestTimeout, TandemError, Unavailable, WorkerLost
from shared.identity import Incarnation
from shared.tokenization.tokenizer import Tokenizer

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens, as OpenAI counts them: a prompt once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int | None = None  # None where no reasoning is told apart


@dataclass(frozen=True, slots=True)
class Patience:
    """How much is done for a session whose worker gave it up; see `GatewaySettings`."""

    migration_wait_s: float
    max_attempts: int
    max_lost_workers: int
    abort_grace_s: float


@dataclass(slots=True)
class Stamps:
    """When things happened to the request, `time.monotonic()`; 0 = not yet."""

    received_s: float
    tokenized_s: float = 0.0
    placed_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0


class Generation:
    """Owned by the request's task. Whoever made it calls `close`, which ends whatever still runs."""

    def __init__(
        self,
        request: GenerationRequest,
        sessions: list[Session],
        mailbox: Mailbox,
        stamps: Stamps,
        *,
        tokenizer: Tokenizer,
        dispatcher: Dispatcher,
        workers: Workers,
        metrics: RequestMetrics,
        ticket: Ticket,
        patience: Patience,
    ) -> None:
        self.request = request
        self.sessions = sessions
        self.stamps = stamps
        self._mailbox = mailbox
        self._dispatcher = dispatcher
        self._workers = workers
        self._metrics = metrics
        self._ticket = ticket
        self._patience = patience
        reading = Reading.of(request, tokenizer)
        self._texts = {
            choice: ChoiceText(position * request.num_choices + choice.index, choice, tokenizer, reading)
            for position, session in enumerate(sessions)
            for choice in session.choices
        }
        self._num_open = len(self._texts)
        self._excluded: frozenset[Incarnation] = frozenset()
        self._migrations: set[asyncio.Task[None]] = set()
        self._timers: list[asyncio.TimerHandle] = []
        self._is_closed = False
        self._uncounted: list[Callable[[], None]] = []
        metrics.running.inc()

    @property
    def num_choices(self) -> int:
        """Choices in the reply."""
        return len(self._texts)

    @property
    def is_over(self) -> bool:
        """Every choice has ended."""
        return not self._num_open

    @property
    def plain_texts(self) -> list[ChoiceText]:
        """Of the choices that may have a line of their own."""
        return [text for text in self._texts.values() if text.is_plain and not text.is_over]

    @property
    def output_tokens(self) -> list[int]:
        """Tokens so far, per choice of the reply."""
        return [text.num_tokens for text in self._texts.values()]

    @property
    def usage(self) -> Usage:
        """Tokens so far; final when every choice has ended."""
        return Usage(
            prompt_tokens=sum(session.num_prompt_tokens for session in self.sessions),
            completion_tokens=sum(text.num_tokens for text in self._texts.values()),
            cached_tokens=sum(session.cached_tokens for session in self.sessions),
            reasoning_tokens=(
                None
                if self.request.sampling.thinking is None
                else sum(text.num_reasoning_tokens for text in self._texts.values())
            ),
        )

    async def start(self, *, wait_s: float, timeout_s: float) -> None:
        """Submits every session.

        Args:
            wait_s: For a first decode worker to appear.
            timeout_s: Of the whole request; 0 = none.

        Raises:
            Unavailable: No worker can take it.
        """
        if timeout_s:
            error = RequestTimeout(f"not finished within the limit of {timeout_s:g} s")
            self._call_later(timeout_s, partial(self._mailbox.post_failure, None, error))
        for session in self.sessions:
            session.begin_placing()
            await self._submit(session, wait_s)
        self.stamps.placed_s = time.monotonic()
        await asyncio.sleep(0)  # what was submitted goes out before it is counted, and the reply to it prepared
        self._count()

    async def batches(self) -> AsyncIterator[list[Delta]]:
        """Yields what may be shown, all that has arrived at a time, until every choice has ended.

        Raises:
            TandemError: A session failed and no other worker goes on with it, or the request took too long.
        """
        while self._num_open:
            choices, failures = await self._mailbox.take()
            now_s = time.monotonic()
            # Tokens first: what arrived before a worker was lost counts, and may have ended a choice.
            deltas = [delta for choice in choices if (delta := self._advance(choice, now_s)) is not None]
            fatal = [error for failure in failures if (error := self._recover(failure)) is not None]
            if deltas:
                yield deltas
                if self._num_open:  # else `close` counts
                    self._count()  # that waits until the client has its first token
            if fatal and self._num_open:  # else it ended just in time
                raise fatal[0]

    def close(self) -> None:
        """Ends whatever still runs, at once; idempotent, never blocks."""
        if self._is_closed:
            return
        self._is_closed = True
        usage = self.usage
        self._report(usage)
        self._ticket.close(usage.completion_tokens)
        for timer in self._timers:
            timer.cancel()
        for migration in self._migrations:
            migration.cancel()
        for session in self.sessions:
            session.cancel()
            self._workers.prefilled(session)
            self._workers.abort(session)

    def _report(self, usage: Usage) -> None:
        """Tells the metrics how it went."""
        self._count()
        metrics = self._metrics
        metrics.running.dec()
        metrics.generation_tokens.inc(usage.completion_tokens)
        metrics.token_gap_s.flush()
        if not self.is_over:
            return
        metrics.prompt_tokens.inc(usage.prompt_tokens)
        metrics.cached_tokens.inc(usage.cached_tokens)
        metrics.request_s.observe(self.stamps.last_token_s - self.stamps.received_s)
        for session in self.sessions:
            if session.finish is not None:
                metrics.session_finished(session.finish.timeline.mode)

    def _advance(self, choice: Choice, now_s: float) -> Delta | None:
        text = self._texts[choice]
        if text.is_over:
            return None
        was_stopped = text.hit_stop_string
        delta = text.advance()
        self._note_tokens(text, now_s)
        if delta.finish_reason is not None:
            self._num_open -= 1
            self._uncounted.append(partial(self._metrics.choice_ended, delta.finish_reason))
        elif text.hit_stop_string and not was_stopped:
            self._stop(choice)
        return None if delta.is_empty else delta

    def _note_tokens(self, text: ChoiceText, now_s: float) -> None:
        """Stamps what just arrived."""
        session = text.choice.session
        self.stamps.last_token_s = now_s
        if not session.first_token_s and text.num_tokens:
            session.first_token_s = now_s
            self._workers.first_token(session)
            self._uncounted.append(partial(self._metrics.session_started, session))
            if not self.stamps.first_token_s:
                self.stamps.first_token_s = now_s
                wait_s = now_s - self.stamps.received_s
                self._uncounted.append(partial(self._metrics.first_token_s.observe, wait_s))

    def _count(self) -> None:
        """Tells the metrics of what they were not told at once, because clients and workers waited."""
        for tell in self._uncounted:
            tell()
        self._uncounted.clear()

    def _stop(self, choice: Choice) -> None:
        """Tells the worker that a stop string ended a choice, and waits a little for its last word."""
        self._workers.abort(choice.session, [choice])
        self._call_later(self._patience.abort_grace_s, partial(_end_unheard, choice))

    async def _submit(self, session: Session, wait_s: float) -> None:
        request = self.request
        await self._dispatcher.submit(
            session,
            cache_salt=request.cache_salt,
            priority=request.priority + self._ticket.caller.priority,
            wait_s=wait_s,
            excluding=self._excluded,
        )
        assert session.placement is not None
        self._uncounted.append(partial(self._metrics.session_placed, session.placement))

    def _recover(self, failure: Failure) -> TandemError | None:
        """Has another worker go on with a session; returns the error that ends the request if none may."""
        session, error = failure.session, failure.error
        if session is None or session.state is SessionState.FAILED:
            return error
        self._workers.prefilled(session)
        for choice in session.unfinished_choices:
            if self._texts[choice].hit_stop_string:
                _end_unheard(choice)  # only its worker's last word was missing
        if session.is_over:
            return None
        if not self._may_go_on(session, error):
            session.fail(error)
            return None
        assert session.placement is not None
        # A worker whose connection broke may be fine and is asked again as soon as it answers; one that refuses is not.
        if self._workers.is_connected(session.placement.decode.incarnation):
            self._excluded |= {session.placement.decode.incarnation}
        session.begin_placing()
        migration = asyncio.create_task(self._migrate(session, error))
        self._migrations.add(migration)
        migration.add_done_callback(self._migrations.discard)
        return None

    def _may_go_on(self, session: Session, error: TandemError) -> bool:
        num_lost = session.losses.count(WorkerLost.code)
        if num_lost >= self._patience.max_lost_workers:
            log.error("session_given_up", session_id=session.session_id, lost_workers=num_lost)
            return False
        return error.retryable and session.attempts < self._patience.max_attempts

    async def _migrate(self, session: Session, error: TandemError) -> None:
        """Places the session once more; what went wrong first says more than that nobody else is there."""
        # Full workers are no reason to wait for new ones.
        wait_s = 0.0 if isinstance(error, Overloaded) else self._patience.migration_wait_s
        try:
            await self._submit(session, wait_s)
        except Unavailable as exc:
            session.fail(type(error)(f"{error.message}; {exc.message}" if wait_s else error.message))
            return
        except Exception:
            log.exception("migration_failed", session_id=session.session_id)
            session.fail(InternalError("internal error; the gateway's log has the details"))
            return
        self._count()
        self._metrics.session_migrated(error.code)
        assert session.placement is not None
        log.info(
            "session_migrated",
            session_id=session.session_id,
            cause=error.code,
            worker_id=session.placement.decode.worker_id,
            tokens=sum(len(choice.token_ids) for choice in session.choices),
        )

    def _call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(delay_s, callback))


def _end_unheard(choice: Choice) -> None:
    """Ends a choice without its worker's last word, unless that came."""
    choice.end(Finish(FinishReason.ABORT))
    choice.session.note_choice_ended()
