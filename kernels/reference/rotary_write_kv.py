"""Rotary position embedding and cache write in one op, because a device can do both in one pass."""

from __future__ import annotations

import torch

from kernels.reference.rotary import rotary
from kernels.reference.write_kv import write_kv


def rotary_write_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Rotates `q` in place and stores rotated `k` and `value`: `rotary`, then `write_kv`.

    Whether `k` itself is rotated is left to the backend: nobody reads it afterwards.

    Args:
        q: `[T, Hq, D]`, modified.
        k: `[T, Hk, D]`, may be modified.
        value: `[T, Hk, D]`.
        positions: int64 `[T]`.
        cos_sin: float32 `[max_positions, D]`.
        kv_cache: `[num_blocks, 2, block_size, Hk, D]`; mutated.
        slot_mapping: int64 `[T]`; a token of slot -1 is not stored.
    """
    rotary(q, k, positions, cos_sin)
    write_kv(k, value, kv_cache, slot_mapping)
