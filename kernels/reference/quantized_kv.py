"""The 8-bit KV cache: one scale per token and head, stored behind the values that it scales.

    row of one head: int8 [head_dim] | float32 scale, 4 bytes in the machine's byte order

A block thereby stays one contiguous run of bytes that says everything about itself. In torch the cache is an int8
tensor `[num_blocks, 2, block_size, Hk, D + 4]`; whatever takes a KV cache takes this one too.
"""

from __future__ import annotations

import torch

SCALE_BYTES = 4
MAX_QUANTUM = 127


def is_quantized(kv_cache: torch.Tensor) -> bool:
    """Whether the rows of a cache end in scales."""
    return kv_cache.dtype == torch.int8


def quantize_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows `[..., D]` of any float dtype -> int8 `[..., D + 4]`, contiguous.

    The scale is `max |x| / 127`; values are `x * (127 / max |x|)` rounded to nearest even. A row of zeros has scale 0.
    """
    rows = rows.float()
    peak = rows.abs().amax(dim=-1, keepdim=True)
    inverse = torch.where(peak > 0, MAX_QUANTUM / peak, torch.zeros_like(peak))
    values = torch.round(rows * inverse).to(torch.int8)
    return torch.cat([values, (peak / MAX_QUANTUM).contiguous().view(torch.int8)], dim=-1)


def dequantize_rows(rows: torch.Tensor) -> torch.Tensor:
    """int8 `[..., D + 4]` -> float32 `[..., D]`."""
    scale = rows[..., -SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    return rows[..., :-SCALE_BYTES].float() * scale
