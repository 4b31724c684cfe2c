"""Matrix multiplication on a CPU with the weight repacked for oneDNN.

`F.linear` leaves float32 to the BLAS that torch was built with, which re-reads a row-major weight inefficiently when
few rows are multiplied: a decode step. oneDNN with a weight in its own blocked layout took 0.4 to 0.85 of the time at
1 to 512 rows (AMD EPYC, two cores). The two ops are the ones that torch's own compiler emits; they are not public, so
`packing_works` proves them before use and everything falls back to `F.linear`.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from kernels.dense_linear import Linear, dense_linear

PACKED_FOR_ROWS = 32
"""Rows for which oneDNN chooses the layout; any number can be multiplied, and a layout for 1 is slow for more."""


class PackedLinear:
    """A weight in oneDNN's blocked layout."""

    __slots__ = ("_bias", "_multiply", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight.default(weight.contiguous(), PACKED_FOR_ROWS)
        self._bias = bias
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        """`x @ weight.T + bias`."""
        result: torch.Tensor = self._multiply(x, self._weight, self._bias, "none", [], "")
        return result


@functools.cache
def packing_works(dtype: torch.dtype) -> bool:
    """Whether this torch, on this CPU, multiplies by a packed weight and gets what `F.linear` gets."""
    weight = torch.linspace(-1.0, 1.0, 48 * 64, dtype=torch.float32).view(48, 64).to(dtype)
    x = torch.linspace(1.0, -0.5, 3 * 64, dtype=torch.float32).view(3, 64).to(dtype)
    try:
        packed = PackedLinear(weight, None)(x)
    except (AttributeError, RuntimeError):  # no such op, or oneDNN has no kernel for the dtype here
        return False
    return torch.allclose(packed.float(), F.linear(x.float(), weight.float()), rtol=2e-2, atol=2e-2)


def packed_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """Repacks a weight `[out, in]` (a copy) if this CPU can use that; else keeps it as it is."""
    return PackedLinear(weight, bias) if packing_works(weight.dtype) else dense_linear(weight, bias)
