"""Steps in which every sequence decodes and its token is chosen by the native kernels alone: one native call each.

The kernels' rows go on by themselves. As long as a step continues the one before it, sequence by sequence, nothing is
written but the blocks that sequences took meanwhile; a sequence that is new in its row is written once.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels.cpu.token_generator import TokenGenerator
from shared.engine.sampler import native_row
from shared.engine.sampling_params import SamplingParams
from shared.engine.sequence import Sequence
from shared.engine.step import ScheduledSequence, StepBatch, StepResult, TokenLogprobs
from shared.identity import BlockId


@dataclass(slots=True)
class _Row:
    """What the generator knows of a row's sequence.

    While length and last block of a block table are the same, so is the table: a block is replaced when it is sealed,
    before the next one is taken, or when it is the last one. The length counts, because a block that a seal gave up may
    be the very one that is taken next.

    Attributes:
        origin: Where the row would have stood before the first of all steps.
        num_blocks, last_block: Of the block table as it was last written.
        num_sealed: Blocks of it that were final then.
    """

    sequence: Sequence
    origin: int
    num_blocks: int
    last_block: BlockId
    num_sealed: int


class PlainDecode:
    """Owned by the runner, which must tell it of every step that it does not run itself (`forget`)."""

    def __init__(self, generator: TokenGenerator, max_logprobs: int) -> None:
        self._generate = generator
        self._max_logprobs = max_logprobs
        self._rows: list[_Row] = []  # as of the last step
        self._with_logprobs: list[int] = []  # rows that want them
        self._logprob_counts: list[int] = []  # of each of those, how many of the likeliest tokens
        self._num_steps = 0

    def run(self, batch: StepBatch) -> StepResult | None:
        """Computes the step; None, and nothing done, if it takes more than that."""
        scheduled, num_steps = batch.scheduled, self._num_steps
        num_known = 0
        for item, row in zip(scheduled, self._rows, strict=False):
            sequence = item.sequence
            if sequence is not row.sequence or item.num_computed - num_steps != row.origin:
                break
            table = sequence.block_table
            if table[-1] != row.last_block or len(table) != row.num_blocks:
                self._extend_table(num_known, row)
            num_known += 1
        if num_known < len(scheduled) or num_known < len(self._rows):
            if not all(map(_is_plain, scheduled)):
                return None
            self._set_rows(scheduled, num_known)
        tokens = self._generate(len(scheduled))
        self._num_steps = num_steps + 1
        logprobs: list[TokenLogprobs | None] = [None] * len(tokens)
        if self._with_logprobs:
            for index, found in zip(self._with_logprobs, self._generate.logprobs(self._logprob_counts), strict=True):
                logprobs[index] = TokenLogprobs(*found)
        return StepResult(tokens, logprobs)

    def forget(self) -> None:
        """Some other step was run: where sequences stand is not known any more."""
        self._rows = []

    def _set_rows(self, scheduled: list[ScheduledSequence], num_known: int) -> None:
        """Makes the rows those of the given sequences, of which the first `num_known` go on and are up to date."""
        known = self._rows
        self._rows = known[:num_known]
        for index, item in enumerate(scheduled[num_known:], start=num_known):
            sequence, position = item.sequence, item.num_computed
            origin = position - self._num_steps
            row = known[index] if index < len(known) else None
            if row is None or row.sequence is not sequence or row.origin != origin:
                params = sequence.sampling
                assert params is not None, "a sequence that samples has parameters"
                how, num_logprobs = native_row(sequence, params), self._num_logprobs(params)
                self._generate.set_row(index, sequence.token_ids[position], position, how, num_logprobs)
                row = _Row(sequence, origin, 0, BlockId(-1), 0)
            self._extend_table(index, row)
            self._rows.append(row)
        counts = [self._num_logprobs(row.sequence.sampling) for row in self._rows]
        self._with_logprobs = [index for index, count in enumerate(counts) if count is not None]
        self._logprob_counts = [count for count in counts if count is not None]

    def _num_logprobs(self, params: SamplingParams | None) -> int | None:
        if params is None or params.num_logprobs is None:
            return None
        return min(params.num_logprobs, self._max_logprobs)

    def _extend_table(self, index: int, row: _Row) -> None:
        """Writes what changed of a table: what was not sealed when it was last written."""
        sequence, table = row.sequence, row.sequence.block_table
        self._generate.set_blocks(index, row.num_sealed, table[row.num_sealed :])
        row.num_blocks, row.last_block, row.num_sealed = len(table), table[-1], sequence.num_sealed_blocks


def _is_plain(item: ScheduledSequence) -> bool:
    """It computes one token and wants the next one, and nothing else."""
    sequence, params = item.sequence, item.sequence.sampling
    if params is None or not item.samples or item.num_new_tokens != 1:
        return False
    is_chosen_natively = not params.edits_logits and sequence.guide is None
    return is_chosen_natively and sequence.num_prompt_logprobs is None and sequence.pooling is None
