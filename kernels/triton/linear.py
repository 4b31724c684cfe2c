"""Matrix multiplication for steps: one row by a kernel that only reads, more rows by the platform's BLAS.

With one row the weight is read once and used once, so time is bytes over bandwidth. The kernel fetches its first
weights before it waits for the kernel that makes its input: they do not depend on it.
"""
# mypy: allow-untyped-calls, disable-error-code="no-untyped-def, untyped-decorator, misc"

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.triton.target import current_target, overlapped

_ROWS = 8
_BLOCK = 512


@triton.jit
def one_row_kernel(
    x,  # [K]
    weight,  # [N, K]
    bias,  # [N], read if HAS_BIAS
    out,  # [N]
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (run of ROWS outputs)."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    row = weight + n[:, None].to(tl.int64) * K + k[None, :]
    first = tl.load(row)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    acc = first.to(tl.float32) * tl.load(x + k).to(tl.float32)[None, :]
    for start in tl.range(BLOCK, K, BLOCK, num_stages=4):
        acc += tl.load(row + start).to(tl.float32) * tl.load(x + start + k).to(tl.float32)[None, :]
    result = tl.sum(acc, 1)
    if HAS_BIAS:
        result += tl.load(bias + n).to(tl.float32)
    tl.store(out + n, result.to(out.dtype.element_ty))


def one_row_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `x @ weight.T + bias`, summed in fp32.

    Args:
        x: `[1, K]` contiguous.
        weight: `[N, K]` contiguous; K a multiple of 512, N of 8.
        bias: `[N]` or None.

    Returns:
        `[1, N]`, in the dtype of `x`.
    """
    outputs, inputs = weight.shape
    out = torch.empty((1, outputs), dtype=x.dtype, device=x.device)
    overlap = current_target().overlaps_launches
    one_row_kernel[(outputs // _ROWS,)](
        x, weight, bias if bias is not None else weight, out,
        K=inputs, ROWS=_ROWS, BLOCK=_BLOCK, HAS_BIAS=bias is not None, OVERLAP=overlap, num_warps=4,
        **overlapped(overlap),
    )  # fmt: skip
    return out


class StepLinear:
    """Row-major weight; see the module."""

    __slots__ = ("_bias", "_takes_one_row", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias
        outputs, inputs = weight.shape
        is_even = inputs % _BLOCK == 0 and outputs % _ROWS == 0 and weight.is_contiguous()
        self._takes_one_row = is_even and weight.dtype in (torch.bfloat16, torch.float16)

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        """`x @ weight.T + bias`: `[T, K]` -> `[T, N]`."""
        if x.shape[0] == 1 and self._takes_one_row and x.is_contiguous():
            return one_row_linear(x, self._weight, self._bias)
        return F.linear(x, self._weight, self._bias)


def step_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> StepLinear:
    """Wraps a weight `[out, in]` without copying it."""
    return StepLinear(weight, bias)
