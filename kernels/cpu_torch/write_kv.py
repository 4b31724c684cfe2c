"""Stores new keys and values in the paged cache."""

from __future__ import annotations

import torch


def write_kv(key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Scatters `key` and `value` `[T, Hk, D]` to their slots; -1 is skipped. See `kernels.reference.write_kv`."""
    if slot_mapping.numel() and int(slot_mapping.min()) < 0:
        stored = slot_mapping >= 0
        key, value, slot_mapping = key[stored], value[stored], slot_mapping[stored]
    block_size = kv_cache.shape[2]
    index = (slot_mapping // block_size, slot_mapping % block_size)
    kv_cache.select(1, 0).index_put_(index, key)
    kv_cache.select(1, 1).index_put_(index, value)
