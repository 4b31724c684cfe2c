"""Log-probabilities of chosen tokens and of the likeliest ones, for all rows of a step in one native call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kernels.cpu.library import Library


class RowLogprobs(NamedTuple):
    """Of a row's token, and of the likeliest tokens, falling; of equal ones the lower id comes first."""

    logprob: float
    top_token_ids: list[int]
    top_logprobs: list[float]


class LogprobArrays:
    """Where the native kernels leave what they find.

    Attributes:
        chosen: float32 `[R]`.
        top_ids: int32 `[R, width]`.
        tops: float32 `[R, width]`.
    """

    def __init__(self, rows: int, width: int) -> None:
        self.chosen = np.zeros(rows, dtype=np.float32)
        self.top_ids = np.zeros((rows, width), dtype=np.int32)
        self.tops = np.zeros((rows, width), dtype=np.float32)

    @property
    def addresses(self) -> tuple[int, int, int]:
        """As native calls take them."""
        return self.chosen.ctypes.data, self.top_ids.ctypes.data, self.tops.ctypes.data

    def rows(self, counts: list[int]) -> Iterator[RowLogprobs]:
        """The first rows, so many of the likeliest tokens of each."""
        for row, count in enumerate(counts):
            top_ids, tops = self.top_ids[row, :count].tolist(), self.tops[row, :count].tolist()
            yield RowLogprobs(float(self.chosen[row]), top_ids, tops)


def token_logprobs(
    library: Library, logits: torch.Tensor, tokens: list[int], counts: list[int]
) -> Iterator[RowLogprobs]:
    """Log-probabilities of every row; a row's bits depend on its logits alone.

    Args:
        library: Whose threads share the rows.
        logits: float32 `[R, V]`, contiguous.
        tokens: One of each row, whose log-probability is wanted whether it is likely or not.
        counts: Of the likeliest tokens of each row, at most `V`.
    """
    assert logits.dtype == torch.float32
    assert logits.is_contiguous()
    rows, vocab_size = logits.shape
    arrays = LogprobArrays(rows, width := max(counts))
    ids: npt.NDArray[np.int64] = np.array(tokens, dtype=np.int64)
    wanted: npt.NDArray[np.int32] = np.array(counts, dtype=np.int32)
    library.calls.tandem_logprobs(
        library.team,
        logits.data_ptr(),
        rows,
        vocab_size,
        ids.ctypes.data,
        wanted.ctypes.data,
        width,
        *arrays.addresses,
    )
    return arrays.rows(counts)
