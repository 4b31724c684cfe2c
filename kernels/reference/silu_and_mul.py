"""The gated activation of Llama-like feed-forward layers (SwiGLU, Shazeer 2020)."""

from __future__ import annotations

import torch


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`, computed in float32.

    Args:
        x: `[T, 2 * I]`: gate in the first half of a row, up in the second.

    Returns:
        New `[T, I]`, contiguous, dtype of `x`.
    """
    half = x.shape[-1] // 2
    gate, up = x[:, :half].float(), x[:, half:].float()
    return (gate / (1.0 + torch.exp(-gate)) * up).to(x.dtype)
