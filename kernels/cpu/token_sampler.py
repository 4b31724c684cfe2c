"""Chooses tokens for all rows of a step in one native call."""

from __future__ import annotations

import numpy as np
import torch

from kernels.cpu.library import Library

ROW = np.dtype(
    [
        ("seed", np.uint64),
        ("choice", np.uint64),
        ("position", np.uint64),
        ("top_p", np.float64),
        ("temperature", np.float32),
        ("min_p", np.float32),
        ("top_k", np.int64),
    ]
)
"""How one row is sampled; `SampleRow` in sample.hpp. Off are temperature 0 (greedy), top_p 1, min_p 0 and top_k 0."""

SampleRow = tuple[int, int, float, float, float, int]
"""A value of each field of `ROW` but `position`, in order."""


class TokenSampler:
    """Chooses a token for each of the same rows, step after step; a row's token does not depend on the others.

    Draws follow shared/engine/noise.py and shared/engine/truncated_draw.py, whose tokens they are except where two
    scores or a cut agree in all but the last bits.
    """

    def __init__(self, library: Library, rows: list[SampleRow]) -> None:
        """Writes down what does not change from step to step.

        Args:
            library: Whose threads share the rows.
            rows: At least one.
        """
        self._library = library
        self._how = np.array([(seed, choice, 0, *rest) for seed, choice, *rest in rows], dtype=ROW)
        self._positions = self._how["position"]
        self._tokens = np.empty(len(rows), dtype=np.int64)
        self._addresses = (self._how.ctypes.data, self._tokens.ctypes.data)

    def __call__(self, logits: torch.Tensor, positions: list[int]) -> list[int]:
        """One token per row.

        Args:
            logits: float32 `[R, V]`, contiguous; overwritten. -inf forbids a token.
            positions: Of the tokens to be chosen, `R` of them.
        """
        assert logits.dtype == torch.float32
        assert logits.is_contiguous()
        self._positions[:] = positions
        count, vocab_size = logits.shape
        self._library.calls.tandem_sample(self._library.team, logits.data_ptr(), count, vocab_size, *self._addresses)
        tokens: list[int] = self._tokens.tolist()
        return tokens
