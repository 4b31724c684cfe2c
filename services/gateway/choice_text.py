"""From one choice's tokens to what its reader sees: text, log-probabilities, and why it ended."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from services.gateway.session import Choice, Finish, FinishReason, TokenLogprobs
from shared.tokenization.detokenizer import IncrementalDetokenizer
from shared.tokenization.stop_strings import StopMatcher
from shared.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """A token whose log-probability is told. `offset` is where its text begins in the choice's text, in characters."""

    token_id: int
    logprobs: TokenLogprobs
    offset: int


@dataclass(slots=True)
class Delta:
    """What a choice has to tell since the last time.

    Attributes:
        index: Of the choice in the reply.
        finish_reason: "stop" or "length" when the choice has ended, which it does once.
        stop_reason: The stop string or stop token that ended it, if one did.
    """

    index: int
    text: str = ""
    tokens: list[TokenEntry] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class ChoiceText:
    """Follows one choice; mutable, owned by the request's task.

    Text that could still turn out to be part of a stop string or of an unfinished character is held back, and tokens
    that begin in it too: so a reader who concatenates what was streamed sees what a reader of the whole reply sees.

    Attributes:
        is_over: Nothing more will come out.
        num_tokens: Tokens generated up to the end, as `usage` counts them.
        num_new_tokens: Of them, how many came with the last `advance`.
        last_token_s: When the last ones came, `time.monotonic()`; 0 = none yet.
    """

    def __init__(self, index: int, choice: Choice, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        self.index = index
        self.choice = choice
        self._tokenizer = tokenizer
        self._stops = stops
        self._min_tokens = choice.session.sampling.min_tokens
        self._has_logprobs = choice.session.sampling.num_logprobs is not None
        self._detokenizer = IncrementalDetokenizer(self._tokenizer)
        self._matcher = StopMatcher(self._stops) if self._stops else None
        self._entries: deque[TokenEntry] = deque()
        self._pushed_chars = 0
        self._shown_chars = 0
        self.num_tokens = 0
        self.num_new_tokens = 0
        self.last_token_s = 0.0
        self.is_over = False

    @property
    def hit_stop_string(self) -> bool:
        """It ended by a stop string, which the worker knows nothing of."""
        return self._matcher is not None and self._matcher.matched is not None

    def advance(self) -> Delta:
        """Takes what arrived and returns what may be shown of it.

        A choice that hit a stop string shows everything at once, but ends with its worker's last word.
        """
        token_ids, logprobs = self.choice.take()
        delta, before = Delta(self.index), self.num_tokens
        if self.is_over:
            return delta
        if not self.hit_stop_string:
            if self._matcher is None and not self._has_logprobs:
                push = self._detokenizer.push
                delta.text = "".join([push(token_id) for token_id in token_ids])
                self.num_tokens += len(token_ids)
            else:
                self._push_each(delta, token_ids, logprobs)
        self.num_new_tokens = self.num_tokens - before
        if self.choice.finish is not None:
            self._finish(delta, self.choice.finish)
        return delta

    def _push_each(self, delta: Delta, token_ids: list[int], logprobs: list[TokenLogprobs]) -> None:
        for position, token_id in enumerate(token_ids):
            if self._has_logprobs:
                self._entries.append(TokenEntry(token_id, logprobs[position], self._pushed_chars))
            self.num_tokens += 1
            text = self._detokenizer.push(token_id)
            self._pushed_chars += len(text)
            if self._matcher is not None and self.num_tokens > self._min_tokens:
                text = self._matcher.push(text)
            delta.text += text
            self._shown_chars += len(text)
            if self.hit_stop_string:
                break
        self._release_entries(delta)

    def _release_entries(self, delta: Delta) -> None:
        while self._entries and self._entries[0].offset < self._shown_chars:
            delta.tokens.append(self._entries.popleft())

    def _finish(self, delta: Delta, finish: Finish) -> None:
        self.is_over = True
        if self.hit_stop_string:
            assert self._matcher is not None
            delta.finish_reason, delta.stop_reason = "stop", self._matcher.matched
            return
        held = self._matcher.flush() if self._matcher is not None else ""
        delta.text += held + self._detokenizer.flush()
        if self._entries and finish.stop_token_id == self._entries[-1].token_id in self._tokenizer.special_ids:
            self._entries.pop()  # the end mark is no part of what was said
        delta.tokens.extend(self._entries)
        self._entries.clear()
        delta.finish_reason = "length" if finish.reason is FinishReason.LENGTH else "stop"
        if finish.stop_token_id in self.choice.session.sampling.stop_token_ids:
            delta.stop_reason = finish.stop_token_id
