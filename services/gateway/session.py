"""One prompt's generation as the gateway owns it, from admission to the last byte.

    worker stream --push/finish/fail--> Choice, Session --post--> Mailbox --take--> the request's one reader

All of it lives on the event loop. The worker stream writes what arrives, in one pass per engine step; the request's
task takes what has arrived since it last looked, so a reader slower than the worker gets fewer, longer pieces.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass, field
from enum import Enum

from services.gateway.placement import Placement
from shared.engine.sampling_params import SamplingParams
from shared.errors import TandemError
from shared.identity import SessionId


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
class Failure:
    """A session that its worker will not finish."""

    session: Session
    error: TandemError


class Mailbox:
    """What arrived for one request and was not read yet. One reader; any number of sessions write."""

    def __init__(self) -> None:
        self._choices: dict[Choice, None] = {}
        self._failures: list[Failure] = []
        self._arrived = asyncio.Event()

    def post(self, choice: Choice) -> None:
        """Tells the reader that a choice has something new."""
        self._choices[choice] = None
        self._arrived.set()

    def post_failure(self, session: Session, error: TandemError) -> None:
        """Tells the reader that a session failed."""
        self._failures.append(Failure(session, error))
        self._arrived.set()

    async def take(self) -> tuple[list[Choice], list[Failure]]:
        """Waits for news and takes all of it."""
        await self._arrived.wait()
        self._arrived.clear()
        choices, failures = list(self._choices), self._failures
        self._choices.clear()
        self._failures = []
        return choices, failures


class Choice:
    """One of a session's generations: tokens that arrived and were not taken yet, and how it ended.

    Attributes:
        index: In the session; part of the noise key, so equal wherever the session runs.
        num_tokens: How many tokens were taken so far.
    """

    __slots__ = ("_logprobs", "_mailbox", "_token_ids", "finish", "index", "num_tokens", "session")

    def __init__(self, session: Session, index: int, mailbox: Mailbox) -> None:
        self.session = session
        self.index = index
        self._mailbox = mailbox
        self.reset()

    def reset(self) -> None:
        """Forgets everything, before the session starts over."""
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self.finish: Finish | None = None
        self.num_tokens = 0

    def push(self, token_id: int) -> None:
        """A token arrived."""
        self._token_ids.append(token_id)
        self._mailbox.post(self)

    def push_logprobs(self, logprobs: TokenLogprobs) -> None:
        """The log-probabilities of the token that was pushed last."""
        self._logprobs.append(logprobs)

    def end(self, finish: Finish) -> None:
        """The worker is done with it."""
        self.finish = finish
        self._mailbox.post(self)

    def take(self) -> tuple[list[int], list[TokenLogprobs]]:
        """Hands over the tokens that arrived, and their log-probabilities if they were asked for."""
        taken = self._token_ids, self._logprobs
        self._token_ids, self._logprobs = [], []
        self.num_tokens += len(taken[0])
        return taken


class Session:
    """One `Submit`: a prompt and its choices. Mutable; owned by the request's task.

    Attributes:
        placement: Where it runs now; None before the first attempt.
        attempts: How many workers were asked.
        is_visible: Something of it went out to the client, so it can't start over unnoticed.
        submitted_s, first_token_s: `time.monotonic()`; 0 = not yet. `submitted_s` is of the last attempt.
    """

    def __init__(
        self, prompt_token_ids: list[int], sampling: SamplingParams, num_choices: int, mailbox: Mailbox
    ) -> None:
        self.session_id = SessionId(secrets.token_hex(12))
        self.prompt_token_ids = prompt_token_ids
        self.sampling = sampling
        self.choices = [Choice(self, index, mailbox) for index in range(num_choices)]
        self.placement: Placement | None = None
        self.attempts = 0
        self.is_visible = False
        self.submitted_s = 0.0
        self.first_token_s = 0.0
        self._mailbox = mailbox

    @property
    def finish(self) -> Finish | None:
        """The first choice's: the one that acquired the prompt's KV."""
        return self.choices[0].finish

    def start_over(self, placement: Placement) -> None:
        """Begins an attempt at a worker."""
        self.session_id = SessionId(secrets.token_hex(12)) if self.attempts else self.session_id
        self.placement = placement
        self.attempts += 1
        self.submitted_s = time.monotonic()
        self.first_token_s = 0.0
        for choice in self.choices:
            choice.reset()

    def fail(self, error: TandemError) -> None:
        """The worker, or the way to it, gave up the whole session."""
        self._mailbox.post_failure(self, error)
