"""The gated activation of Llama-like feed-forward layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of `x` `[T, 2 * I]`; new `[T, I]`."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
