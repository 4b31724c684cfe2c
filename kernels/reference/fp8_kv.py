"""The fp8 KV cache: e4m3 values as they are, with no scale beside them.

A float keeps its relative precision wherever it lies: e4m3 has three bits of mantissa from 2^-6 to 448 (240 in the fnuz
encoding of gfx942), subnormal steps of 2^-9 below. A scale would move that window, not refine the steps in it, and the
keys and values of language models lie well inside. Without one a row is head_dim bytes, which a device loads 16 at a
time; with 4 bytes of scale behind it (see `quantized_kv`, where a step's size does depend on the scale) it could not.
What lies beyond the window saturates.
"""

from __future__ import annotations

import torch


def is_fp8(dtype: torch.dtype) -> bool:
    """Whether it is one of the two encodings of e4m3."""
    return dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


def to_fp8(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Any float dtype -> `dtype`, same shape: nearest even, what is too large becomes the largest number, NaN stays."""
    largest = torch.finfo(dtype).max
    return x.float().clamp(-largest, largest).to(dtype)
