"""Steps in which every sequence decodes and its token is chosen by the native kernels alone: one native call each.

The kernels' rows go on by themselves. As long as a step continues the one before it, sequence by sequence, nothing is
written but the blocks that sequences took meanwhile; a sequence that is new in its row is written once.
"""

from __future__ import annotations

from itertools import count

from kernels.cpu.token_generator import TokenGenerator
from shared.engine.sampler import native_row
from shared.engine.sequence import Sequence
from shared.engine.step import ScheduledSequence, StepBatch, StepResult
from shared.identity import BlockId

_Tail = tuple[int, BlockId]
"""Length of a block table and its last block. While they are the same, so is the table: a block is replaced when it is
sealed, before the next one is taken, or when it is the last one. The length counts, because a block that a seal gave up
may be the very one that is taken next."""


class PlainDecode:
    """Owned by the runner, which must tell it of every step that it does not run itself (`forget`)."""

    def __init__(self, generator: TokenGenerator) -> None:
        self._generate = generator
        self._sequences: list[Sequence] = []  # by row, as of the last step
        self._positions: list[int] = []  # where the rows stand now
        self._tails: list[_Tail] = []
        self._num_sealed: list[int] = []  # blocks of a row that were final when its table was last written

    def run(self, batch: StepBatch) -> StepResult | None:
        """Computes the step; None, and nothing done, if it takes more than that."""
        scheduled = batch.scheduled
        sequences = [item.sequence for item in scheduled]
        positions = [item.num_computed for item in scheduled]
        if sequences != self._sequences or positions != self._positions:
            if not all(map(_is_plain, scheduled)):
                return None
            self._set_rows(sequences, positions)
        tails = [(len(sequence.block_table), sequence.block_table[-1]) for sequence in sequences]
        if tails != self._tails:
            self._extend_tables(sequences, tails)
        tokens = self._generate(len(sequences))
        self._positions = [position + 1 for position in positions]
        return StepResult(tokens, [None] * len(tokens))

    def forget(self) -> None:
        """Some other step was run: where sequences stand is not known any more."""
        self._sequences, self._positions, self._tails, self._num_sealed = [], [], [], []

    def _set_rows(self, sequences: list[Sequence], positions: list[int]) -> None:
        """Makes the rows those of the given sequences; those that go on in their rows are left alone."""
        num_known = len(self._sequences)
        known = list(zip(self._sequences, self._positions, strict=True))
        del self._tails[len(sequences) :], self._num_sealed[len(sequences) :]
        for row, sequence, position in zip(count(), sequences, positions, strict=False):
            if row < num_known and known[row] == (sequence, position):
                continue
            params = sequence.sampling
            assert params is not None, "a sequence that samples has parameters"
            self._generate.set_row(row, sequence.token_ids[position], position, native_row(sequence, params))
            self._generate.set_blocks(row, 0, sequence.block_table)
            self._tails[row : row + 1] = [(len(sequence.block_table), sequence.block_table[-1])]
            self._num_sealed[row : row + 1] = [sequence.num_sealed_blocks]
        self._sequences = sequences

    def _extend_tables(self, sequences: list[Sequence], tails: list[_Tail]) -> None:
        """Writes what changed of tables that end otherwise: what was not sealed when they were written."""
        for row, sequence in enumerate(sequences):
            if tails[row] != self._tails[row]:
                first = self._num_sealed[row]
                self._generate.set_blocks(row, first, sequence.block_table[first:])
                self._num_sealed[row] = sequence.num_sealed_blocks
        self._tails = tails


def _is_plain(item: ScheduledSequence) -> bool:
    """It computes one token and wants the next one, and nothing else."""
    sequence, params = item.sequence, item.sequence.sampling
    if params is None or not item.samples or item.num_new_tokens != 1:
        return False
    is_chosen_natively = params.num_logprobs is None and not params.edits_logits and sequence.guide is None
    return is_chosen_natively and sequence.num_prompt_logprobs is None and sequence.pooling is None
