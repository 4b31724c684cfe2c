"""Matrix multiplication with the weight as it is stored: any device, any dtype."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F


class Linear(Protocol):
    """`[T, in] -> [T, out]`, in the dtype of the input; keeps its own weight."""

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        """Multiplies every row of `x`."""
        ...


class DenseLinear:
    """Row-major weight, multiplied by the platform's BLAS."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        """`x @ weight.T + bias`."""
        return F.linear(x, self._weight, self._bias)


def dense_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """Wraps a weight `[out, in]` without copying it."""
    return DenseLinear(weight, bias)
