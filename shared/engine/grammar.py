"""Constrained output: grammars compiled for a model's vocabulary, and where one output stands in its grammar.

Why llguidance (2026-11-23; llguidance 1.9.1 and xgrammar 0.2.8, pydoc-mini's 6,144 tokens, one core of a machine that
others used too; `loadtest/grammar_bench.py`):

                                                llguidance      xgrammar
    import and tokenizer                        0.06 s, 13 MiB  3.1 s, 247 MiB (it needs torch and transformers)
    compile: 3 fields / 40 nested objects       0.5 / 6.1 ms    1.4 / 14.5 ms
    mask per token, median: likewise            3.7 / 8.4 us    2.8 / 2.4 us
    mask per token, worst of all                1.6 ms          4.7 ms
    a compiled schema of 40 objects             330 KiB         599 KiB
    JSON Schema Test Suite 2020-12, 368 schemas:
      compiled, refused                         164, 204        344, 24
      let an invalid instance through           0 schemas       173 schemas

Masks cost microseconds either way: eight streams of guided JSON decode at 0.9 to 1.0 times the rate of free ones (the
spread is the machine's). What decides is that llguidance refuses what it cannot keep, naming the keyword, and
that the gateway can check grammars with it without torch. Its work per compilation and per mask is bounded by fuel.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import llguidance
import numpy as np
import numpy.typing as npt

from shared.errors import InvalidRequest

MAX_CACHED_BYTES = 16 << 20
"""Of grammar source; a compiled JSON schema takes some 40 times its source."""


def grammar_limits() -> llguidance.LLParserLimits:
    """What compiling a grammar, and every mask from it, may cost at most."""
    return llguidance.LLParserLimits(
        max_items_in_row=2_000,
        initial_lexer_fuel=1_000_000,  # some 20 ms
        step_lexer_fuel=200_000,  # some 15 ms
        step_max_items=50_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,  # no schema text in logs
    )


class GrammarCompiler:
    """Compiles for one vocabulary and remembers; safe to use from several threads.

    Args:
        tokenizer_json: The checkpoint's `tokenizer.json`, its content.
        vocab_size: Columns of the logits.
        eos_token_ids: What may follow a complete output; not empty.
        max_cached_bytes: Of the sources of the compiled grammars that are kept.
    """

    def __init__(
        self,
        tokenizer_json: str,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        *,
        max_cached_bytes: int = MAX_CACHED_BYTES,
    ) -> None:
        self._tokenizer = llguidance.LLTokenizer(
            tokenizer_json,
            n_vocab=vocab_size,
            eos_token=sorted(eos_token_ids),
            slices=llguidance.LLTokenizer.json_slices(),
        )
        self._max_cached_bytes = max_cached_bytes
        self._cached: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    @property
    def num_cached(self) -> int:
        """Grammars that will not be compiled again."""
        return len(self._cached)

    def matcher(self, grammar: str) -> llguidance.LLMatcher:
        """A matcher at the grammar's start, the caller's own. Compiles without the GIL if it must.

        Raises:
            InvalidRequest: The grammar is wrong, or more complex than the limits allow.
        """
        with self._lock:
            matcher = self._cached.get(grammar)
            if matcher is not None:
                self._cached.move_to_end(grammar)
                return matcher.deep_copy()
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=grammar_limits())
        if matcher.is_error():
            raise InvalidRequest(f"the grammar cannot be compiled: {matcher.get_error()[:500]}")
        self._check_start(matcher)
        self._keep(grammar, matcher)
        return matcher.deep_copy()

    def _check_start(self, matcher: llguidance.LLMatcher) -> None:
        """Compiling takes grammars of which no output is; only looking for the first token shows it."""
        start = matcher.deep_copy()
        start.compute_bitmask()
        if start.is_error():
            raise InvalidRequest("the grammar cannot be compiled: there is no output that it allows")

    def _keep(self, grammar: str, matcher: llguidance.LLMatcher) -> None:
        with self._lock:
            if grammar in self._cached or len(grammar) > self._max_cached_bytes:
                return
            self._cached[grammar] = matcher
            self._cached_bytes += len(grammar)
            while self._cached_bytes > self._max_cached_bytes:
                evicted, _ = self._cached.popitem(last=False)
                self._cached_bytes -= len(evicted)


class OutputGrammar:
    """Where one output stands in its grammar. Mutable; touched by one thread at a time.

    The state follows from the output's tokens alone: a sequence that was preempted, or continues elsewhere, catches up.

    Attributes:
        error: Why no further mask can be had: a limit on its cost was hit. "" so far.
    """

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher
        self.error = ""

    def consume(self, token_ids: Sequence[int]) -> None:
        """Follows tokens that the output got."""
        if token_ids and not self.error and not self._matcher.consume_tokens(list(token_ids)):
            self._fail()

    def fill(self, row: npt.NDArray[np.uint32]) -> None:
        """Writes which tokens may follow, a bit for each; none if there is an error."""
        if self.error:
            row[:] = 0
            return
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if self._matcher.is_error():
            self._fail()
            row[:] = 0

    def _fail(self) -> None:
        self.error = f"the grammar cannot be followed any further: {self._matcher.get_error()[:300]}"
