"""Root-mean-square normalisation, alone and fused with the residual addition (Zhang and Sennrich 2019)."""
# mypy: allow-untyped-calls, disable-error-code="no-untyped-def, untyped-decorator, misc"

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.triton.target import current_target, overlapped


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    x,  # [T, H]
    residual,  # [T, H], read if ADD
    weight,  # [H]
    out,  # [T, H]
    residual_out,  # [T, H], written if ADD
    num_rows,
    x_stride,
    residual_stride,
    H,
    eps,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (rows / ROWS). The sum is rounded to the residual's dtype before it is normalised, as when stored apart."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = (row < num_rows)[:, None] & (column < H)[None, :]
    value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row[:, None] * residual_stride + column[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        rounded = value.to(residual_out.dtype.element_ty)
        tl.store(residual_out + row[:, None] * H + column[None, :], rounded, mask=mask)
        value = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, 1) / H + eps)
    scale = tl.load(weight + column, mask=column < H, other=0.0).to(tl.float32)
    result = value * inverse[:, None] * scale[None, :]
    tl.store(out + row[:, None] * H + column[None, :], result.to(out.dtype.element_ty), mask=mask)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    residual_out: torch.Tensor,
    eps: float,
    *,
    add: bool,
) -> None:
    num_rows, width = x.shape
    if num_rows == 0:
        return
    block = triton.next_power_of_2(width)
    rows = max(1, 1024 // block)
    overlap = current_target().overlaps_launches
    rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
        x, residual, weight, out, residual_out, num_rows, x.stride(0), residual.stride(0), width, eps,
        ADD=add, ROWS=rows, BLOCK=block, OVERLAP=overlap, num_warps=max(4, min(16, block // 512)),
        **overlapped(overlap),
    )  # fmt: skip


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight`, computed in fp32.

    Args:
        x: `[T, H]`, last dimension contiguous; for a norm per head, `[T * heads, D]`.
        weight: `[H]`.
        eps: added to the mean square.

    Returns:
        `[T, H]` contiguous, in the dtype of `x`.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, x, weight, out, out, eps, add=False)
    return out


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(rms_norm(residual'), residual')` with `residual' = x + residual`, reading each input once.

    Args:
        x: `[T, H]`, output of the last block.
        residual: `[T, H]`, the stream it is added to; not modified.
        weight: `[H]`.
        eps: added to the mean square.

    Returns:
        Two new `[T, H]` tensors, in the dtypes of `x` and of `residual`.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    residual_out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    _launch(x, residual, weight, out, residual_out, eps, add=True)
    return out, residual_out
