"""Root-mean-square normalisation; torch's own op, which upcasts half precision itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalises the rows of `x` `[T, H]` by `weight` `[H]`; see `kernels.reference.rms_norm`."""
    return F.rms_norm(x, weight.shape, weight, eps)


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `(rms_norm(x + residual), x + residual)`, all `[T, H]`."""
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total
