"""A batch as the arrays that launches on a device read, padded to the shape of the step."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from shared.engine.noise import noise_keys
from shared.engine.sampling_params import SamplingParams
from shared.engine.sequence import PENDING_TOKEN, Sequence
from shared.engine.staged_arrays import Array, ArraySpec, StagedArrays
from shared.engine.step import ScheduledSequence, StepBatch
from shared.engine.step_shape import StepShape
from shared.identity import SequenceId
from shared.models.decoder import ForwardInputs

_MIN_CHUNK = 9
"""Query runs up to 8 have kernels of their own, which mixed steps do without: all take the same ones."""


@dataclass(frozen=True, slots=True)
class DrawArrays:
    """How each row's token is chosen, on the device, `[num_sequences]` each; see `kernels.triton.sample`."""

    temperature: torch.Tensor
    keys: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor

    def rows(self, count: int) -> DrawArrays:
        """The first ones."""
        return DrawArrays(
            self.temperature[:count], self.keys[:count], self.top_k[:count], self.top_p[:count], self.min_p[:count]
        )


class DeviceStepInputs:
    """Fills the arrays of a step and sends them.

    Args:
        max_batch_tokens, max_sequences, max_blocks: Largest step.
        num_stages: Steps that may be in flight, and one more.
    """

    def __init__(
        self,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        max_blocks: int,
        block_size: int,
        device: torch.device,
        num_stages: int,
    ) -> None:
        self._block_size = block_size
        tokens, rows = (max_batch_tokens,), (max_sequences,)
        specs = [
            ArraySpec("token_ids", np.int64, tokens),
            ArraySpec("positions", np.int64, tokens),
            ArraySpec("slot_mapping", np.int64, tokens),
            ArraySpec("sources", np.int32, tokens),
            ArraySpec("keys", np.int64, rows),
            ArraySpec("query_start", np.int32, (max_sequences + 1,)),
            ArraySpec("seq_lens", np.int32, rows),
            ArraySpec("sample_rows", np.int32, rows),
            ArraySpec("top_k", np.int32, rows),
            ArraySpec("temperature", np.float32, rows),
            ArraySpec("top_p", np.float32, rows),
            ArraySpec("min_p", np.float32, rows),
            ArraySpec("block_tables", np.int32, (max_sequences, max_blocks)),
        ]
        self._arrays = StagedArrays(specs, device, num_stages=num_stages)
        made = self._arrays.device
        self.token_ids, self.sources, self.sample_rows = made["token_ids"], made["sources"], made["sample_rows"]
        self.draws = DrawArrays(made["temperature"], made["keys"], made["top_k"], made["top_p"], made["min_p"])

    def views(self, shape: StepShape) -> ForwardInputs:
        """What the model reads in a step of this shape; always the same memory."""
        made, tokens, rows = self._arrays.device, shape.num_tokens, shape.num_sequences
        return ForwardInputs(
            token_ids=made["token_ids"][:tokens],
            positions=made["positions"][:tokens],
            slot_mapping=made["slot_mapping"][:tokens],
            block_tables=made["block_tables"][:rows],
            query_start=made["query_start"][: rows + 1],
            seq_lens=made["seq_lens"][:rows],
            # What a mixed step holds differs from step to step: no run is so long that it rules out single tokens.
            max_query_len=1 if shape.is_decode else max(_MIN_CHUNK, shape.num_tokens + 1),
            max_seq_len=shape.max_seq_len,
        )

    def send(self, batch: StepBatch, shape: StepShape, sampled_rows: Mapping[SequenceId, int]) -> None:
        """Fills and sends everything that the step reads; what it does not use is padding that computes nothing.

        Args:
            batch: Fits the shape; empty for a step of padding.
            shape: What `views` gave or a captured graph has.
            sampled_rows: Rows of the last step's tokens, by sequence: where pending tokens come from.
        """
        host = self._arrays.next_stage()
        num_tokens = self._fill_tokens(host, batch.scheduled, sampled_rows)
        num_sequences = len(batch.scheduled)
        self._fill_tables(host, batch.scheduled)
        self._fill_slots(host, num_tokens, num_sequences)
        host["token_ids"][num_tokens : shape.num_tokens] = 0
        host["positions"][num_tokens : shape.num_tokens] = 0
        host["slot_mapping"][num_tokens : shape.num_tokens] = -1
        host["sources"][num_tokens : shape.num_tokens] = -1
        host["seq_lens"][num_sequences : shape.num_sequences] = 0
        # A padding row of a decode step has one token of a sequence of none, of a mixed step no token.
        unused = slice(num_sequences + 1, shape.num_sequences + 1)
        host["query_start"][unused] = np.arange(unused.start, unused.stop) if shape.is_decode else num_tokens
        self._fill_draws(host, batch.scheduled, shape)
        self._arrays.send(shape.num_sequences)

    def _fill_tokens(
        self, host: dict[str, Array], scheduled: list[ScheduledSequence], sampled_rows: Mapping[SequenceId, int]
    ) -> int:
        tokens: list[int] = []
        positions: list[int] = []
        starts: list[int] = [0]
        pending: list[tuple[int, int]] = []
        for item in scheduled:
            sequence, begin, end = item.sequence, item.num_computed, item.end
            if end - begin == 1:
                tokens.append(sequence.token_ids[begin])
                positions.append(begin)
            else:
                tokens += sequence.token_ids[begin:end]
                positions += range(begin, end)
            if tokens[-1] == PENDING_TOKEN:
                pending.append((len(tokens) - 1, sampled_rows[sequence.sequence_id]))
            starts.append(len(tokens))
        count = len(tokens)
        host["token_ids"][:count] = tokens
        host["positions"][:count] = positions
        host["query_start"][: len(starts)] = starts
        host["seq_lens"][: len(scheduled)] = [item.end for item in scheduled]
        host["sources"][:count] = -1
        for index, row in pending:
            host["token_ids"][index] = 0
            host["sources"][index] = row
        return count

    def _fill_tables(self, host: dict[str, Array], scheduled: list[ScheduledSequence]) -> None:
        """Only the blocks in use: attention looks no further than a sequence's last one."""
        tables, block_size = host["block_tables"], self._block_size
        for row, item in enumerate(scheduled):
            count = -(-item.end // block_size)
            tables[row, :count] = array("i", item.sequence.block_table[:count])

    def _fill_slots(self, host: dict[str, Array], num_tokens: int, num_sequences: int) -> None:
        positions = host["positions"][:num_tokens]
        rows = np.repeat(np.arange(num_sequences), np.diff(host["query_start"][: num_sequences + 1]))
        blocks = host["block_tables"][rows, positions // self._block_size].astype(np.int64)
        host["slot_mapping"][:num_tokens] = blocks * self._block_size + positions % self._block_size

    def _fill_draws(self, host: dict[str, Array], scheduled: list[ScheduledSequence], shape: StepShape) -> None:
        rows = [int(row) - 1 for row, item in zip(host["query_start"][1:], scheduled, strict=False) if item.samples]
        sampling = [item.sequence for item in scheduled if item.samples]
        params = [sampling_of(sequence) for sequence in sampling]
        count = len(rows)
        host["sample_rows"][:count] = rows
        host["sample_rows"][count : shape.num_sequences] = 0
        host["temperature"][:count] = [p.temperature for p in params]
        host["temperature"][count : shape.num_sequences] = 0.0
        host["top_k"][:count] = [p.top_k for p in params]
        host["top_p"][:count] = [p.top_p for p in params]
        host["min_p"][:count] = [p.min_p for p in params]
        keys = noise_keys([p.seed for p in params], [s.choice for s in sampling], [s.num_tokens for s in sampling])
        host["keys"][:count] = keys.numpy()


def sampling_of(sequence: Sequence) -> SamplingParams:
    """The parameters of a sequence that samples."""
    assert sequence.sampling is not None, f"sequence {sequence.sequence_id} samples nothing but is asked for a token"
    return sequence.sampling
