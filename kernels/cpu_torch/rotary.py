"""Rotary position embedding, half-split order, in place."""

from __future__ import annotations

import torch


def _rotate(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> None:
    """`x` `[T, heads, D]` becomes `x * cos + swapped halves * signed_sin`; `[T, 1, 1, D/2]` and `[T, 1, 2, D/2]`."""
    halves = x.view(*x.shape[:2], 2, -1)
    wide = halves if halves.dtype == cos.dtype else halves.float()
    swapped = wide.flip(2)
    wide.mul_(cos).addcmul_(swapped, signed_sin)
    if wide is not halves:
        halves.copy_(wide)


def rotary(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
    """Rotates `q` `[T, Hq, D]` and `k` `[T, Hk, D]` as `kernels.reference.rotary` says."""
    cos, sin = cos_sin.index_select(0, positions).view(positions.shape[0], 2, 1, 1, -1).unbind(1)
    signed_sin = torch.cat((-sin, sin), dim=2)
    _rotate(q, cos, signed_sin)
    _rotate(k, cos, signed_sin)
