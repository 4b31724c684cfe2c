"""From one choice's tokens to what its reader sees: text, log-probabilities, and why it ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from services.gateway.requests.request import GenerationRequest
from services.gateway.sessions.session import Choice, Finish, FinishReason, TokenLogprobs
from services.gateway.syntax.pieces import CallPiece, Pieces
from services.gateway.syntax.reply_parser import ReplyParser, ReplySyntax
from shared.engine.thinking import ThinkingState
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
        text: Of the answer, if replies are told into answer, reasoning and calls; else all.
        token_ids: New ones, if they are asked for.
        num_tokens: Of the choice so far.
        finish_reason: "stop" or "length" when the choice has ended, which it does once.
        stop_reason: The stop string or stop token that ended it, if one did.
    """

    index: int
    text: str = ""
    reasoning: str = ""
    calls: Sequence[CallPiece] = ()
    token_ids: Sequence[int] = ()
    num_tokens: int = 0
    tokens: Sequence[TokenEntry] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def is_empty(self) -> bool:
        """There is nothing that a reader would see."""
        return not (self.text or self.tokens or self.finish_reason or self.reasoning or self.calls or self.token_ids)


@dataclass(frozen=True, slots=True)
class Reading:
    """How the tokens of a request's choices are read.

    Attributes:
        stops: Stop strings.
        shown: Special tokens that show in the text by their names.
        includes_stop: The stop string, or a special token that ended the choice, shows too.
        hides_all: Nothing shows; the prompt alone was asked for.
        wants_token_ids: Deltas tell their tokens.
        syntax: Tells answer, reasoning and calls apart; None = all is answer.
    """

    stops: tuple[str, ...] = ()
    shown: frozenset[int] = frozenset()
    includes_stop: bool = False
    hides_all: bool = False
    wants_token_ids: bool = False
    syntax: ReplySyntax | None = None

    @classmethod
    def of(cls, request: GenerationRequest, tokenizer: Tokenizer) -> Reading:
        """As the request wants it."""
        marks = request.syntax.marks if request.syntax is not None else ()
        shown = {token_id for mark in marks if (token_id := tokenizer.special_id(mark)) is not None}
        return cls(
            stops=request.stop,
            shown=frozenset(shown) if request.skip_special_tokens else tokenizer.special_ids,
            includes_stop=request.include_stop,
            hides_all=request.hides_output,
            wants_token_ids=request.returns_token_ids,
            syntax=request.syntax,
        )


class ChoiceText:
    """Follows one choice; mutable, owned by the request's task.

    Text that could still turn out to be part of a stop string or of an unfinished character is held back, and tokens
    that begin in it too: so a reader who concatenates what was streamed sees what a reader of the whole reply sees.

    Attributes:
        is_over: Nothing more will come out.
        hit_stop_string: It ended by a stop string, which the worker knows nothing of.
        num_reasoning_tokens: Of `num_tokens`, how many belong to reasoning.
        is_plain: It is its tokens' text and nothing else until it ends: so long they need not go through here.
        detokenizer: Tokens to text.
    """

    def __init__(self, index: int, choice: Choice, tokenizer: Tokenizer, reading: Reading) -> None:
        self.index = index
        self.choice = choice
        self._tokenizer = tokenizer
        self._reading = reading
        self._min_tokens = choice.session.sampling.min_tokens
        self._has_logprobs = choice.session.sampling.num_logprobs is not None
        thinking = choice.session.sampling.thinking
        self.detokenizer = IncrementalDetokenizer(tokenizer, reading.shown)
        self._matcher = StopMatcher(reading.stops) if reading.stops else None
        self._parser = ReplyParser(reading.syntax) if reading.syntax is not None else None
        self._thinking = ThinkingState(thinking) if thinking is not None else None
        self.num_reasoning_tokens = 0
        self.is_plain = not (self._matcher or self._has_logprobs or self._parser or self._thinking) and not (
            reading.hides_all or reading.wants_token_ids or reading.shown
        )
        self._entries: deque[TokenEntry] = deque()
        self._pushed_chars = 0
        self._shown_chars = 0
        self._num_pushed = 0
        self.is_over = False
        self.hit_stop_string = False

    @property
    def num_tokens(self) -> int:
        """Tokens generated up to the end, as `usage` counts them."""
        return self.choice.num_taken if self.is_plain else self._num_pushed

    def advance(self) -> Delta:
        """Takes what arrived and returns what may be shown of it.

        A choice that hit a stop string shows everything at once, but ends with its worker's last word.
        """
        token_ids, logprobs = self.choice.take()
        if self.is_plain and self.choice.finish is None:
            return Delta(self.index, self.detokenizer.push_all(token_ids), num_tokens=self.num_tokens)
        delta, before = Delta(self.index), self._num_pushed
        if self.is_over:
            return delta
        if not self.hit_stop_string and not self._reading.hides_all:
            end_mark = self._hidden_end()
            if self._matcher is None and not self._has_logprobs and end_mark is None:
                delta.text = self.detokenizer.push_all(token_ids)
                self._num_pushed += len(token_ids)
            else:
                self._push_each(delta, token_ids, logprobs, end_mark)
            self._note_tokens(delta, token_ids[: self._num_pushed - before])
        delta.num_tokens = self.num_tokens
        if self.choice.finish is not None:
            self._finish(delta, self.choice.finish)
        if self._parser is not None:
            self._parse(delta, self._parser)
        return delta

    def _hidden_end(self) -> int | None:
        """The special token that ended the choice, where special tokens show and this one must not."""
        finish, reading = self.choice.finish, self._reading
        if finish is None or reading.includes_stop or finish.stop_token_id not in reading.shown:
            return None
        return finish.stop_token_id

    def _note_tokens(self, delta: Delta, token_ids: list[int]) -> None:
        if self._reading.wants_token_ids:
            delta.token_ids = token_ids
        if self._thinking is not None:
            self.num_reasoning_tokens += sum(map(self._thinking.push, token_ids))

    def _parse(self, delta: Delta, parser: ReplyParser) -> None:
        """Tells the delta's text into its parts."""
        found = parser.push(delta.text) if delta.text else Pieces()
        if delta.finish_reason is not None:
            last = parser.finish()
            found = Pieces(found.text + last.text, found.reasoning + last.reasoning, found.calls + last.calls)
            is_named = self._reading.syntax is not None and self._reading.syntax.is_named_call
            if parser.has_calls and delta.finish_reason == "stop" and not is_named:
                delta.finish_reason = "tool_calls"
        delta.text, delta.reasoning, delta.calls = found.text, found.reasoning, found.calls

    def _push_each(
        self, delta: Delta, token_ids: list[int], logprobs: list[TokenLogprobs], end_mark: int | None
    ) -> None:
        for position, token_id in enumerate(token_ids):
            if self._has_logprobs:
                self._entries.append(TokenEntry(token_id, logprobs[position], self._pushed_chars))
            self._num_pushed += 1
            is_end = token_id == end_mark and position == len(token_ids) - 1
            text = "" if is_end else self.detokenizer.push(token_id)
            self._pushed_chars += len(text)
            if self._matcher is not None and self._num_pushed > self._min_tokens:
                text = self._matcher.push(text)
                if self._matcher.matched is not None:
                    self.hit_stop_string = True
                    text += self._matcher.matched if self._reading.includes_stop else ""
            delta.text += text
            self._shown_chars += len(text)
            if self.hit_stop_string:
                break
        self._release_entries(delta)

    def _release_entries(self, delta: Delta) -> None:
        entries, shown_chars = self._entries, self._shown_chars
        released: list[TokenEntry] = []
        while entries and entries[0].offset < shown_chars:
            released.append(entries.popleft())
        delta.tokens = released

    def _finish(self, delta: Delta, finish: Finish) -> None:
        self.is_over = True
        if self._reading.hides_all:
            delta.finish_reason = "length"
            return
        if self.hit_stop_string:
            assert self._matcher is not None
            delta.finish_reason, delta.stop_reason = "stop", self._matcher.matched
            return
        held = self._matcher.flush() if self._matcher is not None else ""
        delta.text += held + self.detokenizer.flush()
        if self._entries and finish.stop_token_id == self._entries[-1].token_id in self._tokenizer.special_ids:
            self._entries.pop()  # the end mark is no part of what was said
        delta.tokens = [*delta.tokens, *self._entries]
        self._entries.clear()
        delta.finish_reason = "length" if finish.reason is FinishReason.LENGTH else "stop"
        if finish.stop_token_id in self.choice.session.sampling.stop_token_ids:
            delta.stop_reason = finish.stop_token_id
