"""Which tokens one output may continue with: grammar, allow-list, banned words, forced ends of reasoning.

What the parts say is combined into one row of bits. A grammar always leaves something, if only the end; the others give
way where nothing would be left, so a row is never empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from shared.engine.grammar import OutputGrammar
from shared.engine.sampling_params import SamplingParams
from shared.engine.thinking import ThinkingState

Row = npt.NDArray[np.uint32]


class OutputGuide:
    """Follows one sequence's output. Mutable; used by the thread that works masks out, between two steps' samplings.

    Depends on nothing but the parameters and the output's tokens, so it catches up wherever a sequence continues.

    Args:
        params: Of the sequence.
        grammar: At its start, of the sequence's own; None = free text.
        eos_token_ids: The model's own.
        vocab_size: Columns of the logits.
    """

    def __init__(
        self, params: SamplingParams, grammar: OutputGrammar | None, eos_token_ids: frozenset[int], vocab_size: int
    ) -> None:
        self._params = params
        self._grammar = grammar
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._thinking = ThinkingState(params.thinking) if params.thinking is not None else None
        self._num_seen = 0
        allowed = params.allowed_token_ids
        self._whole = _bits(range(vocab_size) if allowed is None else allowed, vocab_size)
        self._ends = _bits(eos_token_ids | params.stop_token_ids, vocab_size)

    @property
    def error(self) -> str:
        """Why the output cannot be guided any further; "" so far. From then on only the end is allowed."""
        return self._grammar.error if self._grammar is not None else ""

    @property
    def has_grammar(self) -> bool:
        """The output must match a grammar."""
        return self._grammar is not None

    def fill(self, output: Sequence[int], row: Row) -> None:
        """Writes which tokens may follow `output`, a bit for each token of the vocabulary.

        Args:
            output: All of it; begins with what it was at the last call.
            row: uint32 `[ceil(V / 32)]`, overwritten.
        """
        self._catch_up(output)
        thinking = self._thinking
        if thinking is not None and (forced := thinking.forced_token) is not None:
            row[:] = 0
            _set(row, forced)
            return
        is_free = self._grammar is None or (thinking is not None and thinking.is_open)
        if self._grammar is None or is_free:
            row[:] = self._whole
        else:
            self._grammar.fill(row)
            if not row.any():
                row[:] = _bits(self._eos_token_ids, self._vocab_size)
            if thinking is not None and thinking.may_open:
                _set(row, self._params.thinking.start_id if self._params.thinking else 0)
        self._narrow(output, row, is_thinking=is_free and self._grammar is not None)

    def _catch_up(self, output: Sequence[int]) -> None:
        new = output[self._num_seen :]
        self._num_seen += len(new)
        if self._thinking is not None:
            new = [token_id for token_id in new if not self._thinking.push(token_id)]
        if self._grammar is not None:
            self._grammar.consume(new)

    def _narrow(self, output: Sequence[int], row: Row, *, is_thinking: bool) -> None:
        """Takes out what must not come now, unless nothing would be left."""
        banned = [word[-1] for word in self._params.bad_words if _ends_with(output, word[:-1])]
        must_go_on = is_thinking or len(output) < self._params.min_tokens
        if not banned and not must_go_on:
            return
        narrowed = row & ~_bits(banned, self._vocab_size)
        if must_go_on:
            narrowed &= ~self._ends
        if narrowed.any():
            row[:] = narrowed


def _ends_with(output: Sequence[int], tokens: Sequence[int]) -> bool:
    return not tokens or list(output[-len(tokens) :]) == list(tokens)


def _bits(token_ids: Iterable[int], vocab_size: int) -> Row:
    is_set = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    is_set[[token_id for token_id in token_ids if token_id < vocab_size]] = 1
    return np.packbits(is_set, bitorder="little").view(np.uint32)


def _set(row: Row, token_id: int) -> None:
    row[token_id // 32] |= np.uint32(1 << (token_id % 32))
