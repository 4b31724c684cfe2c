"""Where a model's reasoning begins and ends in its output, by tokens. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Thinking:
    """What a session says about reasoning.

    Attributes:
        start_id: The token that opens reasoning at the beginning of an output; -1 = none does.
        end_ids: The tokens that close it; not empty.
        is_open: The prompt ends inside of reasoning.
        max_tokens: Reasoning of so many tokens is closed by force; None = no limit.
    """

    start_id: int
    end_ids: tuple[int, ...]
    is_open: bool = False
    max_tokens: int | None = None


class ThinkingState:
    """Follows the marks through one output; depends on the output's tokens alone. Mutable.

    Attributes:
        is_open: The output is inside of reasoning.
    """

    __slots__ = ("_num_seen", "_num_thoughts", "_tail", "_thinking", "is_open")

    def __init__(self, thinking: Thinking) -> None:
        self._thinking = thinking
        self._tail: tuple[int, ...] = ()
        self._num_seen = 0
        self._num_thoughts = 0
        self.is_open = thinking.is_open

    @property
    def may_open(self) -> bool:
        """The next token is the first one and may be the one that opens reasoning."""
        return not self._num_seen and not self.is_open and self._thinking.start_id >= 0

    @property
    def forced_token(self) -> int | None:
        """What the next token must be, because reasoning has had all the tokens it may have."""
        limit = self._thinking.max_tokens
        if not self.is_open or limit is None or self._num_thoughts < limit:
            return None
        return self._thinking.end_ids[self._num_thoughts - limit]

    def push(self, token_id: int) -> bool:
        """Follows one token; True if it belongs to reasoning or is one of its marks."""
        if not self.is_open:
            self.is_open = self.may_open and token_id == self._thinking.start_id
            self._num_seen += 1
            return self.is_open
        end_ids = self._thinking.end_ids
        self._num_seen += 1
        self._num_thoughts += 1
        self._tail = (*self._tail, token_id)[-len(end_ids) :]
        self.is_open = self._tail != end_ids
        return True
