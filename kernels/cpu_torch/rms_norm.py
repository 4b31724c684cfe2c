"""Root-mean-square normalisation in few dispatches: at a decode step's size they cost more than the arithmetic."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F


@functools.cache
def _constant(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalises the rows of `x` `[T, H]` by `weight` `[H]`; see `kernels.reference.rms_norm`."""
    if x.dtype != torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = torch.addcmul(_constant(eps), norm, norm, value=1.0 / x.shape[-1]).rsqrt_()
    return (x * scale).mul_(weight)


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `(rms_norm(x + residual), x + residual)`, all `[T, H]`."""
    total = x + residual
    return rms_norm(total, weight, eps), total
