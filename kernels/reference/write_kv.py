"""Stores new keys and values in the paged cache."""

from __future__ import annotations

import torch

from kernels.reference.fp8_kv import is_fp8, to_fp8
from kernels.reference.quantized_kv import is_quantized, quantize_rows


def write_kv(key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Writes token `t` to slot `slot_mapping[t]`, which is `block_id * block_size + offset`.

    Args:
        key: `[T, Hk, D]`; heads contiguous, any token stride.
        value: `[T, Hk, D]`, likewise.
        kv_cache: `[num_blocks, 2, block_size, Hk, D]`, one layer's view of the arena (any block stride); mutated. Of
            int8 it is quantized, see `quantized_kv`; of fp8 values saturate, see `fp8_kv`.
        slot_mapping: int64 `[T]`, distinct; a token of slot -1 is not stored.
    """
    block_size = kv_cache.shape[2]
    if is_quantized(kv_cache):
        key, value = quantize_rows(key), quantize_rows(value)
    elif is_fp8(kv_cache.dtype):
        key, value = to_fp8(key, kv_cache.dtype), to_fp8(value, kv_cache.dtype)
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            kv_cache[slot // block_size, 0, slot % block_size] = key[token]
            kv_cache[slot // block_size, 1, slot % block_size] = value[token]
