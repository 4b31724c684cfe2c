"""The gate of a SwiGLU feed-forward block (Shazeer 2020)."""
# mypy: allow-untyped-calls, disable-error-code="no-untyped-def, untyped-decorator, misc"

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.triton.target import current_target, overlapped


@triton.jit
def silu_and_mul_kernel(
    x,  # [T, 2 * I]
    out,  # [T, I]
    x_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (token, chunk of the intermediate dimension)."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + row * x_stride + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + WIDTH + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * WIDTH + i, result.to(out.dtype.element_ty), mask=i < WIDTH)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """Return `silu(x[:, :I]) * x[:, I:]`, computed in fp32.

    Args:
        x: `[T, 2 * I]`, last dimension contiguous: gate and up projection side by side.

    Returns:
        `[T, I]` contiguous, in the dtype of `x`.
    """
    num_tokens, width = x.shape
    out = torch.empty((num_tokens, width // 2), dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return out
    block = min(1024, triton.next_power_of_2(width // 2))
    overlap = current_target().overlaps_launches
    silu_and_mul_kernel[(num_tokens, triton.cdiv(width // 2, block))](
        x, out, x.stride(0), WIDTH=width // 2, BLOCK=block, OVERLAP=overlap, num_warps=4, **overlapped(overlap)
    )
    return out
