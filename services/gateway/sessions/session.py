"""One prompt's generation as the gateway owns it, from admission to the last byte.

    worker stream --push/end/lose--> Choice, Session --post--> Mailbox --take--> the request's one reader
                                        '-----line----> the client

All of it lives on the event loop. The worker stream writes what arrives, in one pass per engine step; the request's
task takes what has arrived since it last looked, so a reader slower than the worker gets fewer, longer pieces. A token
that is nothing but text, of a request whose task waits, skips all that on a direct line to its client.

A session outlives its workers: the choices keep every token that arrived, and another worker goes on from there.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from services.gateway.access.caller import current_caller
from services.gateway.sessions.placement import Placement
from services.gateway.sessions.session_state import SESSION_TRANSITIONS, SessionEvent, SessionState
from shared.engine.sampling_params import SamplingParams
from shared.errors import TandemError
from shared.identity import TOKEN_BYTES, SessionId, pack_tokens, unpack_tokens
from shared.state_machine import StateMachine


class FinishReason(Enum):
    """Why a worker ended a choice."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class Timeline:
    """How the worker spent its time, in seconds since it received the session; see `protos/worker.proto`."""

    queued_s: float = 0.0
    prefill_s: float = 0.0
    fetch_s: float = 0.0
    verify_s: float = 0.0
    first_step_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    fetched_bytes: int = 0
    local_blocks: int = 0
    fetched_blocks: int = 0
    missed_blocks: int = 0
    prefill_worker: str = ""
    mode: str = ""


@dataclass(frozen=True, slots=True)
class Finish:
    """A worker's last word on a choice. `stop_token_id` is -1 when no token stopped it."""

    reason: FinishReason
    stop_token_id: int = -1
    cached_tokens: int = 0
    output_tokens: int = 0
    timeline: Timeline = field(default_factory=Timeline)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One sampled token's log-probability and the likeliest tokens', descending."""

    logprob: float
    top_token_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PromptScore:
    """A prompt token's log-probability, the likeliest tokens in its place, and its own rank among them all."""

    logprobs: TokenLogprobs
    rank: int


@dataclass(frozen=True, slots=True)
class Failure:
    """A session that its worker gave up, or if None the whole request."""

    session: Session | None
    error: TandemError


class Mailbox:
    """What arrived for one request and was not read yet. One reader; any number of sessions write.

    The reader wakes once for all that one engine step brought. A bare future wakes it: of everything that happens per
    step and stream, an `asyncio.Event` would be among the dearest.

    Attributes:
        waiting: What wakes the reader while it waits and nothing is here, else None.
    """

    __slots__ = ("_choices", "_failures", "waiting")

    def __init__(self) -> None:
        self._choices: dict[Choice, None] = {}
        self._failures: list[Failure] = []
        self.waiting: asyncio.Future[None] | None = None

    def post(self, choice: Choice) -> None:
        """Tells the reader that a choice has something new."""
        self._choices[choice] = None
        if self.waiting is not None:
            self._wake(self.waiting)

    def post_failure(self, session: Session | None, error: TandemError) -> None:
        """Tells the reader that a session, or the whole request, failed."""
        self._failures.append(Failure(session, error))
        if self.waiting is not None:
            self._wake(self.waiting)

    async def take(self) -> tuple[list[Choice], list[Failure]]:
        """Waits for news and takes all of it."""
        if not self._choices and not self._failures:
            self.waiting = asyncio.get_running_loop().create_future()
            try:
                await self.waiting
            finally:
                self.waiting = None  # also where the reader was cancelled: it may have a last word to send
        choices, failures = list(self._choices), self._failures
        self._choices.clear()
        if failures:
            self._failures = []
        return choices, failures

    def _wake(self, waiting: asyncio.Future[None]) -> None:
        self.waiting = None
        if not waiting.done():  # the reader was cancelled, and did not run since
            waiting.set_result(None)


Line = Callable[[int], bool]
"""Sends a token's text to the client at once, or returns False: then nothing was sent."""


class Choice:
    """One of a session's generations: every token that arrived, what was not taken of it yet, and how it ended.

    Attributes:
        index: In the session; part of the noise key, so equal wherever the session runs.
        token_ids: All that arrived, from whichever worker.
        finish: The last word on it; None before.
        line: Takes tokens while the request's task waits for news, if such a line was laid.
        num_taken: How many of the tokens were taken, by either.
        pushed_s: When the last one arrived, `time.monotonic()`; 0 = none yet.
    """

    __slots__ = (
        "_is_begun", "_logprobs", "_mailbox",
        "finish", "index", "line", "num_taken", "pushed_s", "session", "token_ids",
    )  # fmt: skip

    def __init__(self, session: Session, index: int, mailbox: Mailbox) -> None:
        self.session = session
        self.index = index
        self.token_ids: list[int] = []
        self.finish: Finish | None = None
        self._mailbox = mailbox
        self.line: Line | None = None
        self.num_taken = 0
        self.pushed_s = 0.0
        self._is_begun = False
        self._logprobs: list[TokenLogprobs] = []

    @property
    def packed_tokens(self) -> bytes:
        """What its next token is generated from: prompt and output, as they are hashed."""
        return self.session.packed_prompt + pack_tokens(self.token_ids)

    def begin(self) -> None:
        """A worker was asked for it, or for the rest of it."""
        self._is_begun = False

    def push(self, token_id: int) -> None:
        """A token arrived."""
        self.token_ids.append(token_id)
        if not self._is_begun:
            self._is_begun = True
            self.session.note_token()
        if self.line is not None and self._mailbox.waiting is not None and self.line(token_id):
            self.num_taken += 1
        else:
            self._mailbox.post(self)

    def push_logprobs(self, logprobs: TokenLogprobs) -> None:
        """The log-probabilities of the token that was pushed last."""
        self._logprobs.append(logprobs)

    def end(self, finish: Finish) -> None:
        """Nothing more will come. The first word on it counts."""
        if self.finish is None:
            self.finish = finish
            self._mailbox.post(self)

    def take(self) -> tuple[list[int], list[TokenLogprobs]]:
        """Hands over the tokens that arrived since, and their log-probabilities if they were asked for."""
        token_ids, logprobs = self.token_ids[self.num_taken :], self._logprobs
        self.num_taken = len(self.token_ids)
        if logprobs:
            self._logprobs = []
        return token_ids, logprobs


class Session:
    """A prompt and its choices, on one worker after another if need be. Mutable; owned by the request's task.

    Attributes:
        tenant: Whom it is served for.
        placement: Where it runs now, or ran last; None before the first attempt.
        attempts: How many workers were asked.
        packed_prompt: The prompt's tokens as they are hashed and sent; nobody else needs them, mostly.
        num_prompt_tokens: How many they are.
        losses: Codes of the errors for which workers gave it up, in order.
        prompt_scores: Of every prompt token but the first, if wanted; complete when the first token arrives.
        submitted_s, first_token_s: `time.monotonic()`; 0 = not yet. `submitted_s` is of the last attempt.
    """

    def __init__(self, packed_prompt: bytes, sampling: SamplingParams, num_choices: int, mailbox: Mailbox) -> None:
        self.session_id = SessionId(secrets.token_hex(12))
        self.packed_prompt = packed_prompt
        self.num_prompt_tokens = len(packed_prompt) // TOKEN_BYTES
        self.sampling = sampling
        self.choices = [Choice(self, index, mailbox) for index in range(num_choices)]
        self.placement: Placement | None = None
        self.tenant = current_caller().tenant
        self.attempts = 0
        self.losses: list[str] = []
        self.prompt_scores: list[PromptScore] = []
        self.submitted_s = 0.0
        self.first_token_s = 0.0
        self._life = StateMachine(SESSION_TRANSITIONS, SessionState.NEW)
        self._cached_tokens: int | None = None
        self._held_tokens = 0
        self._mailbox = mailbox

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt's tokens, made anew."""
        return unpack_tokens(self.packed_prompt)

    @property
    def state(self) -> SessionState:
        """Where it stands."""
        return self._life.state

    @property
    def is_over(self) -> bool:
        """Finished, failed or cancelled."""
        return self._life.is_final

    @property
    def attempt_id(self) -> SessionId:
        """Its name at the present worker: another for each attempt, since one worker may see several."""
        return self.session_id if self.attempts <= 1 else SessionId(f"{self.session_id}-{self.attempts}")

    @property
    def finish(self) -> Finish | None:
        """The first choice's: the one that acquired the prompt's KV."""
        return self.choices[0].finish

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not computed for it, as the worker that began it reported."""
        if self._cached_tokens is None and self.finish is not None:
            self.note_started(self.finish.cached_tokens)
        return self._cached_tokens or 0

    @property
    def unfinished_choices(self) -> list[Choice]:
        """Those that still want tokens."""
        return [choice for choice in self.choices if choice.finish is None]

    @property
    def has_output(self) -> bool:
        """Tokens arrived: another worker must go on from them, and with the same weights."""
        return any(choice.token_ids for choice in self.choices)

    def begin_placing(self) -> None:
        """A worker is being looked for."""
        self._life.apply(SessionEvent.PLACE)

    def begin_attempt(self, placement: Placement) -> None:
        """A worker was found; it is asked now."""
        self._life.apply(SessionEvent.SUBMIT)
        if not self.attempts:
            longest = max((holder.num_blocks for holder in placement.holders), default=0)
            self._held_tokens = longest * placement.decode.block_size
        self.placement = placement
        self.attempts += 1
        self.submitted_s = time.monotonic()
        for choice in self.choices:
            choice.begin()
        if len(self.prompt_scores) < self.num_prompt_tokens - 1:
            self.prompt_scores.clear()

    def note_started(self, cached_tokens: int) -> None:
        """The worker told how much of the prompt's KV it reused. The first word counts.

        A later worker may reuse what one before it computed for this very session and did not live to tell of: no more
        is counted than was known to be somewhere when the session was placed first.
        """
        if self._cached_tokens is None:
            known = cached_tokens if self.attempts <= 1 else min(cached_tokens, self._held_tokens)
            self._cached_tokens = known

    def note_prompt_scores(self, scores: list[PromptScore]) -> None:
        """More of the prompt was scored; what a worker after the first one says again is not needed."""
        if len(self.prompt_scores) < self.num_prompt_tokens - 1:
            self.prompt_scores += scores

    def note_token(self) -> None:
        """A token of any choice arrived."""
        if self.state is SessionState.SUBMITTED:
            self._life.apply(SessionEvent.TOKEN)

    def note_choice_ended(self) -> None:
        """One choice has its `finish`; with the last one the session is over."""
        if not self.is_over and not self.unfinished_choices:
            self._life.apply(SessionEvent.FINISH)

    def lose(self, error: TandemError) -> None:
        """The worker, or the way to it, gave the session up; nothing more comes from there."""
        if not self.is_over:
            self._life.apply(SessionEvent.LOSE)
            self.losses.append(error.code)
            self._mailbox.post_failure(self, error)

    def fail(self, error: TandemError) -> None:
        """No worker will go on with it."""
        self._life.apply(SessionEvent.FAIL)
        self._mailbox.post_failure(self, error)

    def cancel(self) -> None:
        """Nobody wants it any more; does nothing when it is over."""
        if not self.is_over:
            self._life.apply(SessionEvent.CANCEL)
