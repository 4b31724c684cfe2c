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

SampleRow = tuple[int, int, int, float, float, float, int]
"""A value of each field of `ROW`, in order."""


def sample_tokens(library: Library, logits: torch.Tensor, rows: list[SampleRow]) -> torch.Tensor:
    """One token per row; a row's token does not depend on the others.

    Draws follow shared/engine/noise.py and shared/engine/truncated_draw.py, whose tokens they are except where two
    scores or a cut agree in all but the last bits.

    Args:
        library: Whose threads share the rows.
        logits: float32 `[R, V]`, contiguous; overwritten. -inf forbids a token.
        rows: `R` of them.

    Returns:
        int64 `[R]`.
    """
    assert logits.dtype == torch.float32
    assert logits.is_contiguous()
    how = np.array(rows, dtype=ROW)
    tokens = torch.empty(len(rows), dtype=torch.int64)
    library.calls.tandem_sample(
        library.team, logits.data_ptr(), len(rows), logits.shape[1], how.ctypes.data, tokens.data_ptr()
    )
    return tokens
