"""Rotary position embedding (Su et al. 2021) in the half-split order of GPT-NeoX and the Hugging Face checkpoints."""

from __future__ import annotations

import torch


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    half = x.shape[-1] // 2
    first, second = x[..., :half].float(), x[..., half:].float()
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    x.copy_(rotated)


def rotary(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
    """Rotates queries and keys in place by the angles of their positions.

    Args:
        q: `[T, Hq, D]`, heads contiguous; a slice of a fused projection is fine.
        k: `[T, Hk, D]`, likewise.
        positions: int64 `[T]`, index of each token in its sequence.
        cos_sin: float32 `[max_positions, D]`: cosines in the first half of a row, sines in the second.
    """
    half = q.shape[-1] // 2
    angles = cos_sin[positions][:, None, :]
    cos, sin = angles[..., :half], angles[..., half:]
    _rotate(q, cos, sin)
    _rotate(k, cos, sin)
