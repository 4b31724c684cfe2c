"""Rotary position embedding and cache write, one after the other."""

from __future__ import annotations

import torch

from kernels.cpu_torch.rotary import rotary
from kernels.cpu_torch.write_kv import write_kv


def rotary_write_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """`rotary`, then `write_kv`, as `kernels.reference.rotary_write_kv` says."""
    rotary(q, k, positions, cos_sin)
    write_kv(k, value, kv_cache, slot_mapping)
