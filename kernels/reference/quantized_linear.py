"""Matrix multiplication by a quantized weight, activations quantized as they come."""

from __future__ import annotations

import torch

from kernels.quantization import Quantization, QuantizedWeight, into_groups

LEAST_PEAK = 1e-30
"""A group whose largest magnitude is not above this counts as zero."""


def quantize_activations(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of -127 .. 127 per group of 64 inputs.

    Args:
        x: `[T, in]`.

    Returns:
        Codes and scales, float32 `[T, G, 64]` and `[T, G]`: `x = codes * scales`, to half a scale.
    """
    groups = into_groups(x.float())
    peaks = groups.abs().amax(-1)
    peaks = torch.where(peaks > LEAST_PEAK, peaks, 0.0)
    factors = torch.where(peaks > 0, 127 / peaks, 0.0)
    return torch.round(groups * factors[..., None]), peaks / 127


def quantized_linear(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """`x @ weight.T + bias` over codes; each group's sum is exact, groups are added in order, in float32.

    Args:
        x: `[T, in]`, any float dtype.
        weight: `[out, in]`.
        bias: `[out]` or None.

    Returns:
        New `[T, out]`, dtype of `x`.
    """
    codes, scales = quantize_activations(x)
    columns = into_groups(weight.codes).float()
    total = torch.zeros(x.shape[0], columns.shape[0], device=x.device)
    for group in range(columns.shape[1]):
        # At most 64 * 127 * 127 < 2^24: float32 holds every partial sum.
        part = codes[:, group] @ columns[:, group].T * scales[:, group, None]
        total += part * weight.scales[:, group] if weight.quantization is Quantization.INT4 else part
    if weight.quantization is Quantization.INT8:
        total *= weight.scales
    return (total if bias is None else total + bias.float()).to(x.dtype)


class QuantizedLinear:
    """Keeps the codes; expands them to float32 at every call, so it is slow: for proofs and where nothing else runs."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: QuantizedWeight, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        """`[T, in] -> [T, out]`, dtype of `x`."""
        return quantized_linear(x, self._weight, self._bias)
