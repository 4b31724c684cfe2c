"""Root-mean-square normalisation (Zhang and Sennrich 2019), alone and with the residual addition before it."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight`, computed in float32.

    Args:
        x: `[T, H]`, last dimension contiguous; for a norm per head, `[T * heads, D]`.
        weight: `[H]`.
        eps: Added to the mean square.

    Returns:
        New `[T, H]`, dtype of `x`.
    """
    wide = x.float()
    mean_square = (wide * wide).mean(dim=-1, keepdim=True)
    return (wide / torch.sqrt(mean_square + eps) * weight.float()).to(x.dtype)


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds, then normalises the sum as it is stored (rounded to its dtype).

    Args:
        x: `[T, H]`, what the last sublayer returned.
        residual: `[T, H]`, the stream so far; a backend may overwrite it or not, the caller drops it.
        weight: `[H]`.
        eps: Added to the mean square.

    Returns:
        `(rms_norm(x + residual), x + residual)`.
    """
    total = x + residual
    return rms_norm(total, weight, eps), total
