"""The flat tensors of a step, filled into buffers that live as long as the runner."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from shared.engine.step import ScheduledSequence, StepBatch
from shared.identity import BlockId, SequenceId
from shared.models.decoder import ForwardInputs


class _Buffer:
    """A host array and its tensor on the model's device: one memory on a CPU, a pinned copy else."""

    __slots__ = ("_device", "_host", "_is_cpu", "_lengths", "_part", "host")

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._is_cpu = device.type == "cpu"
        self._host = torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
        self._device = self._host if self._is_cpu else torch.zeros(shape, dtype=dtype, device=device)
        self._lengths: tuple[int, ...] = shape
        self._part = self._device
        self.host: npt.NDArray[np.int64] = self._host.numpy()

    def publish(self, *lengths: int) -> torch.Tensor:
        """The leading part, `lengths` of each dimension, on the device: the same object while they stay the same."""
        if lengths != self._lengths:
            self._lengths, self._part = lengths, self._device[_leading(lengths)]
        if not self._is_cpu:
            self._part.copy_(self._host[_leading(lengths)], non_blocking=True)
        return self._part


def _leading(lengths: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, length) for length in lengths)


_TableKey = tuple[SequenceId, int, BlockId, int, int]
"""While it is the same, so is a row: sequence, blocks, the last of them (a copy may have taken its place), those sealed
(sealing may put another block in), preemptions."""
_NO_TABLE: _TableKey = (SequenceId(0), 0, BlockId(0), 0, 0)


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """A batch, ready to run.

    Attributes:
        inputs: For the model.
        sample_rows: Indices into the step's tokens of the last token of every sequence that samples, in batch order.
    """

    inputs: ForwardInputs
    sample_rows: list[int]


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
        self._table_keys: list[_TableKey] = []
        self._rows = np.arange(max_sequences + 1)
        self._offsets = np.arange(block_size)
        self._query_start = _Buffer((max_sequences + 1,), torch.int32, device)
        self._seq_lens = _Buffer((max_sequences,), torch.int32, device)

    def prepare(self, batch: StepBatch, *, store: bool = True) -> PreparedStep:
        """Fills the buffers.

        Args:
            batch: Not empty, within the sizes given at construction.
            store: False maps every token to no slot: the step then leaves the cache as it is.
        """
        scheduled = batch.scheduled
        num_sequences = len(scheduled)
        max_query_len = max([item.num_new_tokens for item in scheduled])
        fill = self._fill_decodes if max_query_len == 1 else self._fill_chunks
        num_tokens, max_seq_len, sample_rows = fill(scheduled)
        if not store:
            self._slot_mapping.host[:num_tokens] = -1
        self._fill_tables(scheduled)
        inputs = ForwardInputs(
            token_ids=self._token_ids.publish(num_tokens),
            positions=self._positions.publish(num_tokens),
            slot_mapping=self._slot_mapping.publish(num_tokens),
            block_tables=self._block_tables.publish(num_sequences, -(-max_seq_len // self._block_size)),
            query_start=self._query_start.publish(num_sequences + 1),
            seq_lens=self._seq_lens.publish(num_sequences),
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
            unwanted=batch.unwanted,
        )
        return PreparedStep(inputs, sample_rows)

    def _fill_decodes(self, scheduled: list[ScheduledSequence]) -> tuple[int, int, list[int]]:
        """As `_fill_chunks`, for one token of every sequence: few calls, because each costs as much as many rows."""
        count, block_size = len(scheduled), self._block_size
        begins = [item.num_computed for item in scheduled]
        self._positions.host[:count] = begins
        self._token_ids.host[:count] = [item.sequence.token_ids[item.num_computed] for item in scheduled]
        self._slot_mapping.host[:count] = [
            item.sequence.block_table[begin // block_size] * block_size + begin % block_size
            for item, begin in zip(scheduled, begins, strict=True)
        ]
        self._query_start.host[: count + 1] = self._rows[: count + 1]
        self._seq_lens.host[:count] = [begin + 1 for begin in begins]
        return count, max(begins) + 1, [row for row, item in enumerate(scheduled) if item.samples]

    def _fill_chunks(self, scheduled: list[ScheduledSequence]) -> tuple[int, int, list[int]]:
        """Fills all but the block tables; returns tokens, longest sequence, rows that sample."""
        tokens: list[int] = []
        positions: list[int] = []
        starts = [0]
        lengths: list[int] = []
        sample_rows: list[int] = []
        for item in scheduled:
            begin, end = item.num_computed, item.num_computed + item.num_new_tokens
            tokens += item.sequence.token_ids[begin:end]
            positions += range(begin, end)
            starts.append(len(tokens))
            lengths.append(end)
            if item.samples:
                sample_rows.append(len(tokens) - 1)
        self._token_ids.host[: len(tokens)] = tokens
        self._positions.host[: len(tokens)] = positions
        self._query_start.host[: len(starts)] = starts
        self._seq_lens.host[: len(lengths)] = lengths
        self._slot_mapping.host[: len(tokens)] = self._slots(scheduled)
        return len(tokens), max(lengths), sample_rows

    def _fill_tables(self, scheduled: list[ScheduledSequence]) -> None:
        """Writes the block tables, padded with each sequence's own first block.

        A row that still says the same is left alone: most do, because a sequence that decodes takes a block only every
        `block_size` steps.

        The padding must name blocks of finite numbers, because attention masks scores, not values; a sequence's own
        block is one, any other might be the destination of a fetch.
        """
        block_size = self._block_size
        keys = [
            (s.sequence_id, count, s.block_table[count - 1], s.num_sealed_blocks, s.num_preemptions)
            for item in scheduled
            for s, count in ((item.sequence, -(-item.end // block_size)),)
        ]
        known, self._table_keys = self._table_keys, keys
        if keys == known:
            return
        known += [_NO_TABLE] * (len(keys) - len(known))
        tables = self._block_tables.host
        for row, item in enumerate(scheduled):
            if keys[row] != known[row]:
                table, count = item.sequence.block_table, keys[row][1]
                tables[row, :count] = array("i", table[:count])
                tables[row, count:] = table[0]

    def _slots(self, scheduled: list[ScheduledSequence]) -> npt.NDArray[np.int64]:
        """`block_table[position / block_size] * block_size + position % block_size` for all tokens."""
        slots = []
        for item in scheduled:
            first = item.num_computed // self._block_size
            blocks = np.array(item.sequence.block_table[first : -(-item.end // self._block_size)], dtype=np.int64)
            covered = blocks[:, None] * self._block_size + self._offsets
            begin = item.num_computed - first * self._block_size
            slots.append(covered.ravel()[begin : begin + item.num_new_tokens])
        return np.concatenate(slots)


def partly_written_blocks(batch: StepBatch, block_size: int) -> list[int]:
    """Blocks that a step begins to write and leaves partly unwritten."""
    blocks: list[int] = []
    for item in batch.scheduled:
        last = (item.end - 1) // block_size
        if last * block_size >= item.num_computed and item.end % block_size:
            blocks.append(item.sequence.block_table[last])
    return blocks
