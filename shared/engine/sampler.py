"""Chooses the next token of every row of a step, in batch.

    raw logits -> (log-probabilities) -> edits -> masks -> greedy: argmax
                                                        -> drawn: temperature, cuts, noise, argmax

A row's token depends on its own logits, parameters and tokens only, never on what else is in the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kernels.cpu.library import Library
from kernels.cpu.token_logprobs import token_logprobs
from kernels.cpu.token_sampler import SampleRow, TokenSampler
from shared.engine.logit_edits import edit_logits
from shared.engine.noise import noise_keys, token_steps
from shared.engine.sampling_params import SamplingParams
from shared.engine.sequence import Sequence
from shared.engine.step import StepResult, TokenLogprobs
from shared.engine.token_masks import TokenMasks
from shared.engine.truncated_draw import Cuts, draw, draw_truncated

_WORD = (1 << 64) - 1
_MIN_TEMPERATURE = 1e-6
"""Below it a draw is greedy in all but name, and dividing by less would overflow."""


@dataclass(frozen=True, slots=True)
class _RawRows:
    """Logits before any edit, of the rows that want log-probabilities."""

    rows: list[int]
    logits: torch.Tensor  # float32 [len(rows), V]


class _Rows:
    """What is known of a step's rows before its logits are; most steps have the rows of the step before.

    Attributes:
        sequences: One per row.
        params: Likewise.
        with_logprobs: Rows whose log-probabilities are wanted.
        has_edits: Some row's logits may have to be changed.
        sampler: Chooses natively; None = torch does.
    """

    __slots__ = ("has_edits", "params", "sampler", "sequences", "with_logprobs")

    def __init__(self, sequences: list[Sequence], library: Library | None) -> None:
        self.sequences = sequences
        self.params = params = [_params(sequence) for sequence in sequences]
        self.with_logprobs = [row for row, p in enumerate(params) if p.num_logprobs is not None]
        self.has_edits = any(p.edits_logits for p in params)
        self.sampler: TokenSampler | None = None
        if library is not None and sequences:
            self.sampler = TokenSampler(library, list(map(native_row, sequences, params)))


class Sampler:
    """Samples for one model; called from the engine thread only."""

    def __init__(
        self,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        *,
        max_logprobs: int,
        device: torch.device,
        library: Library | None = None,
    ) -> None:
        """Prepares what depends on the vocabulary.

        Args:
            vocab_size: Columns of the logits.
            eos_token_ids: The model's own.
            max_logprobs: More than this many likeliest tokens are never returned.
            device: Where the logits will be.
            library: Chooses natively what is on the CPU; None = torch does.
        """
        self._library = library
        self._eos_token_ids = eos_token_ids
        self._max_logprobs = min(max_logprobs, vocab_size)
        self._device = device
        self._steps = token_steps(torch.arange(vocab_size, device=device))
        self._masks = TokenMasks(vocab_size, device)
        self._rows = _Rows([], library)

    def begin(self, sequences: list[Sequence]) -> None:
        """Starts on what can be done before the logits are there; `sample` for the same sequences must follow."""
        self._masks.begin(sequences)

    def sample(self, logits: torch.Tensor, sequences: list[Sequence]) -> StepResult:
        """One token per row.

        Args:
            logits: `[R, V]`, any float dtype, contiguous; overwritten if it is float32.
            sequences: As given to `begin`, `R` of them, each with all tokens before the one to be chosen.
        """
        if sequences != self._rows.sequences:
            self._rows = _Rows(sequences, self._library)
        rows = self._rows
        logits = logits.float()
        raw = _RawRows(rows.with_logprobs, logits[rows.with_logprobs]) if rows.with_logprobs else None
        if rows.has_edits:
            edit_logits(logits, sequences, self._eos_token_ids)
        self._masks.apply(logits)
        if rows.sampler is not None:
            tokens = rows.sampler(logits, [len(sequence.token_ids) for sequence in sequences])
        else:
            tokens = self._choose(logits, sequences, rows.params).tolist()
        logprobs: list[TokenLogprobs | None] = [None] * len(tokens)
        if raw is not None:
            self._fill_logprobs(logprobs, raw, tokens, rows.params)
        return StepResult(token_ids=tokens, logprobs=logprobs)

    def _choose(self, logits: torch.Tensor, sequences: list[Sequence], params: list[SamplingParams]) -> torch.Tensor:
        """int64 `[R]`: a token for every row; `logits` `[R, V]` is overwritten."""
        drawn = [row for row, p in enumerate(params) if not p.is_greedy]
        if len(drawn) == len(params):
            return self._draw(logits, sequences, params)
        tokens = logits.argmax(dim=-1)
        if drawn:
            index = torch.tensor(drawn, device=self._device)
            tokens[index] = self._draw(logits[index], [sequences[r] for r in drawn], [params[r] for r in drawn])
        return tokens

    def _draw(self, logits: torch.Tensor, sequences: list[Sequence], params: list[SamplingParams]) -> torch.Tensor:
        """int64 `[R]`: a draw for every row; `logits` `[R, V]` is overwritten."""
        keys = noise_keys(
            [p.seed for p in params],
            [sequence.choice for sequence in sequences],
            [sequence.num_tokens for sequence in sequences],
        ).to(self._device)
        logits.div_(self._column([max(p.temperature, _MIN_TEMPERATURE) for p in params], torch.float32)[:, None])
        cut = [row for row, p in enumerate(params) if p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0]
        if not cut:
            return draw(logits, keys, self._steps)
        cuts = Cuts(
            top_k=self._column([min(params[row].top_k, logits.shape[1]) for row in cut], torch.int64),
            top_p=self._column([params[row].top_p for row in cut], torch.float64),
            min_p=self._column([params[row].min_p for row in cut], torch.float32),
        )
        if len(cut) == len(params):
            return draw_truncated(logits, keys, cuts)
        tokens = torch.empty_like(keys)
        whole_rows = self._column(sorted(set(range(len(params))).difference(cut)), torch.int64)
        cut_rows = self._column(cut, torch.int64)
        tokens[whole_rows] = draw(logits[whole_rows], keys[whole_rows], self._steps)
        tokens[cut_rows] = draw_truncated(logits[cut_rows], keys[cut_rows], cuts)
        return tokens

    def _fill_logprobs(
        self, logprobs: list[TokenLogprobs | None], raw: _RawRows, tokens: list[int], params: list[SamplingParams]
    ) -> None:
        """Sets the entries of the rows that want them."""
        counts = [min(params[row].num_logprobs or 0, self._max_logprobs) for row in raw.rows]
        chosen = [tokens[row] for row in raw.rows]
        if self._library is not None:
            found: Iterator[TokenLogprobs] = itertools.starmap(
                TokenLogprobs, token_logprobs(self._library, raw.logits, chosen, counts)
            )
        else:
            found = self._torch_logprobs(raw.logits, chosen, counts)
        for row, entry in zip(raw.rows, found, strict=True):
            logprobs[row] = entry

    def _torch_logprobs(self, logits: torch.Tensor, tokens: list[int], counts: list[int]) -> Iterator[TokenLogprobs]:
        total = logits.logsumexp(dim=-1, keepdim=True)
        chosen = (logits.gather(1, self._column(tokens, torch.int64)[:, None]) - total).squeeze(1).tolist()
        top, top_ids = logits.topk(max(counts), dim=-1)
        top_logprobs, top_token_ids = (top - total).tolist(), top_ids.tolist()
        for i, count in enumerate(counts):
            yield TokenLogprobs(chosen[i], top_token_ids[i][:count], top_logprobs[i][:count])

    def _column(self, values: list[int] | list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)


def native_row(sequence: Sequence, p: SamplingParams) -> SampleRow:
    """How the native kernels choose a sequence's tokens."""
    return (p.seed & _WORD, sequence.choice, p.top_p, p.temperature, p.min_p, p.top_k)


def _params(sequence: Sequence) -> SamplingParams:
    if sequence.sampling is None:
        raise AssertionError(f"sequence {sequence.sequence_id} samples nothing but is asked for a token")
    return sequence.sampling
