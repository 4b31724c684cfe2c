"""The flat tensors of a step, filled into buffers that live as long as the runner."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from shared.engine.step import StepBatch
from shared.identity import SequenceId
from shared.models.decoder import ForwardInputs


class _Buffer:
    """A host array and its tensor on the model's device: one memory on a CPU, a pinned copy else."""

    __slots__ = ("_device", "_host", "_is_cpu", "host")

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._is_cpu = device.type == "cpu"
        self._host = torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
        self._device = self._host if self._is_cpu else torch.zeros(shape, dtype=dtype, device=device)
        self.host: npt.NDArray[np.int64] = self._host.numpy()

    def publish(self, *lengths: int) -> torch.Tensor:
        """The leading part, `lengths` of each dimension, on the device."""
        part = tuple(slice(0, length) for length in lengths)
        if not self._is_cpu:
            self._device[part].copy_(self._host[part], non_blocking=True)
        return self._device[part]


_TableKey = tuple[SequenceId, int, int, int]
"""While it is the same, so is a row: sequence, blocks, those sealed (sealing may put another block in), preemptions."""


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """A batch, ready to run.

    Attributes:
        inputs: For the model.
        sample_rows: Indices into the step's tokens of the last token of every sequence that samples, in batch order.
        fresh_blocks: Blocks that this step begins to write and leaves partly unwritten.
    """

    inputs: ForwardInputs
    sample_rows: list[int]
    fresh_blocks: list[int]


class StepInputs:
    """Turns a `StepBatch` into tensors. The tensors of one step are overwritten by the next."""

    def __init__(
        self, *, max_batch_tokens: int, max_sequences: int, max_blocks: int, block_size: int, device: torch.device
    ) -> None:
        self._block_size = block_size
        self._token_ids = _Buffer((max_batch_tokens,), torch.int64, device)
        self._positions = _Buffer((max_batch_tokens,), torch.int64, device)
        self._slot_mapping = _Buffer((max_batch_tokens,), torch.int64, device)
        self._block_tables = _Buffer((max_sequences, max_blocks), torch.int32, device)
        self._table_keys: list[_TableKey | None] = [None] * max_sequences
        self._query_start = _Buffer((max_sequences + 1,), torch.int32, device)
        self._seq_lens = _Buffer((max_sequences,), torch.int32, device)

    def prepare(self, batch: StepBatch, *, store: bool = True) -> PreparedStep:
        """Fills the buffers.

        Args:
            batch: Not empty, within the sizes given at construction.
            store: False maps every token to no slot: the step then leaves the cache as it is.
        """
        tokens, positions, starts, lengths, sample_rows = self._flatten(batch)
        num_tokens, num_sequences = len(tokens), len(lengths)
        width = -(-max(lengths) // self._block_size)
        self._token_ids.host[:num_tokens] = tokens
        self._positions.host[:num_tokens] = positions
        self._query_start.host[: num_sequences + 1] = starts
        self._seq_lens.host[:num_sequences] = lengths
        fresh_blocks = self._fill_tables(batch)
        self._fill_slots(num_tokens, num_sequences, store=store)
        inputs = ForwardInputs(
            token_ids=self._token_ids.publish(num_tokens),
            positions=self._positions.publish(num_tokens),
            slot_mapping=self._slot_mapping.publish(num_tokens),
            block_tables=self._block_tables.publish(num_sequences, width),
            query_start=self._query_start.publish(num_sequences + 1),
            seq_lens=self._seq_lens.publish(num_sequences),
            max_query_len=max(item.num_new_tokens for item in batch.scheduled),
            max_seq_len=max(lengths),
        )
        return PreparedStep(inputs, sample_rows, fresh_blocks)

    @staticmethod
    def _flatten(batch: StepBatch) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
        """Token ids, positions, query starts, sequence lengths, rows that sample."""
        tokens: list[int] = []
        positions: list[int] = []
        starts = [0]
        lengths: list[int] = []
        sample_rows: list[int] = []
        for item in batch.scheduled:
            begin, end = item.num_computed, item.num_computed + item.num_new_tokens
            tokens += item.sequence.token_ids[begin:end]
            positions += range(begin, end)
            starts.append(len(tokens))
            lengths.append(end)
            if item.samples:
                sample_rows.append(len(tokens) - 1)
        return tokens, positions, starts, lengths, sample_rows

    def _fill_tables(self, batch: StepBatch) -> list[int]:
        """Writes the block tables, padded with each sequence's own first block, and returns the fresh blocks.

        A row that still says the same is left alone: most do, because a sequence that decodes takes a block only every
        `block_size` steps.

        The padding must name blocks of finite numbers, because attention masks scores, not values; a sequence's own
        block is one, any other might be the destination of a fetch.
        """
        block_size, tables, keys = self._block_size, self._block_tables.host, self._table_keys
        fresh: list[int] = []
        for row, item in enumerate(batch.scheduled):
            end = item.num_computed + item.num_new_tokens
            count = -(-end // block_size)
            sequence = item.sequence
            table = sequence.block_table
            key = (sequence.sequence_id, count, sequence.num_sealed_blocks, sequence.num_preemptions)
            if keys[row] != key:
                keys[row] = key
                tables[row, :count] = array("i", table[:count])
                tables[row, count:] = table[0]
            last_begin = (count - 1) * block_size
            if last_begin >= item.num_computed and end < last_begin + block_size:
                fresh.append(table[count - 1])
        return fresh

    def _fill_slots(self, num_tokens: int, num_sequences: int, *, store: bool) -> None:
        """`block_table[position / block_size] * block_size + position % block_size` for all tokens at once."""
        if not store:
            self._slot_mapping.host[:num_tokens] = -1
            return
        positions = self._positions.host[:num_tokens]
        rows = np.repeat(np.arange(num_sequences), np.diff(self._query_start.host[: num_sequences + 1]))
        blocks = self._block_tables.host[rows, positions // self._block_size].astype(np.int64)
        self._slot_mapping.host[:num_tokens] = blocks * self._block_size + positions % self._block_size
