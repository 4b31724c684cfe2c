"""Matrix multiplication whose result for a row does not depend on the other rows: the linear layers of invariant mode.

A BLAS chooses another kernel, and so another order of additions, for another number of rows. Here the inputs are cut
into runs, as many as the weight's shape says and never the batch; a run is summed by the matrix unit in ascending order
from zero, and runs are added in ascending order. With few rows each run is a program's own, and a second kernel adds
them, so that reading the weight fills the device; with many a program does all runs of its tile. The additions are the
same ones.
"""
# mypy: allow-untyped-calls, disable-error-code="no-untyped-def, untyped-decorator, misc"

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.triton.target import Target, current_target

_PROGRAMS = 264
"""Of one row tile, about: two per multiprocessor of an H200. A constant, not the device's number: it decides bits."""
_LEAST_TILES_PER_RUN = 8
_ROW_TILES_TOGETHER = 8
_REDUCE_BLOCK = 1024


@triton.jit(do_not_specialize=["num_rows", "num_runs"])
def invariant_linear_kernel(
    x,  # [M, K]
    weight,  # [N, K]
    bias,  # [N], read if HAS_BIAS and WHOLE
    out,  # [M, N] if WHOLE, else fp32 [num_runs, M, N]
    num_rows,
    num_runs,
    x_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TOGETHER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (tile, run). Tiles are numbered so that neighbours share rows of `x` and of `weight` in the L2 cache."""
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    band = tl.program_id(0) // (TOGETHER * tiles_n)
    height = tl.minimum(tiles_m - band * TOGETHER, TOGETHER)
    within = tl.program_id(0) % (TOGETHER * tiles_n)
    m = (band * TOGETHER + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows past the end are copies of the last: computed, not stored, and no load needs a mask.
    rows = x + tl.minimum(m, num_rows - 1).to(tl.int64)[:, None] * x_stride + k[None, :]
    columns = weight + tl.minimum(n, N - 1).to(tl.int64)[None, :] * K + k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first_run = tl.program_id(1)
    for run in tl.range(first_run, num_runs if WHOLE else first_run + 1, num_stages=1):
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for at in tl.range(run * RUN, tl.minimum((run + 1) * RUN, K), BLOCK_K, num_stages=STAGES):
            if K % BLOCK_K == 0:
                a, b = tl.load(rows + at), tl.load(columns + at)
            else:
                a = tl.load(rows + at, mask=(at + k < K)[None, :], other=0.0)
                b = tl.load(columns + at, mask=(at + k < K)[:, None], other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
        total += acc
    stored = (m < num_rows)[:, None] & (n < N)[None, :]
    at_out = m.to(tl.int64)[:, None] * N + n[None, :]
    if WHOLE:
        if HAS_BIAS:
            total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        tl.store(out + at_out, total.to(out.dtype.element_ty), mask=stored)
    else:
        tl.store(out + first_run.to(tl.int64) * num_rows * N + at_out, total, mask=stored)


@triton.jit(do_not_specialize=["num_runs"])
def add_runs_kernel(
    partial,  # fp32 [num_runs, M, N]
    bias,  # [N], read if HAS_BIAS
    out,  # [M, N]
    num_runs,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Grid (row, chunk of outputs)."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    size = tl.num_programs(0).to(tl.int64) * N
    for run in range(num_runs):
        total += tl.load(partial + run * size + row * N + n, mask=n < N, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + row * N + n, total.to(out.dtype.element_ty), mask=n < N)


@dataclass(frozen=True, slots=True)
class _Tile:
    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


@functools.cache
def _tiles(target: Target, operand_bytes: int) -> tuple[_Tile, _Tile]:
    """Return the tile for few rows and that for many: both issue the same matrix instruction, which the tests read off.

    On Hopper that is 64 x 128 x 16, once per warp group and step; elsewhere the two are one tile.
    """
    if operand_bytes == 4:
        same = _Tile(64, 64, 32, 4, 2)
    elif target.is_amd:
        same = _Tile(64, 128, 64, 4, 2)
    elif not target.has_wgmma:
        same = _Tile(64, 128, 32, 4, 4)
    elif target.arch >= 100:
        same = _Tile(128, 128, 64, 8, 3)
    else:
        return _Tile(64, 128, 64, 4, 4), _Tile(128, 128, 64, 8, 4)
    return same, same


def num_runs_of(outputs: int, inputs: int, tile_outputs: int, tile_inputs: int) -> int:
    """Return how many runs a product's inputs are cut into: a function of the weight's shape alone."""
    wanted = _PROGRAMS // -(-outputs // tile_outputs)
    return max(1, min(wanted, inputs // (_LEAST_TILES_PER_RUN * tile_inputs)))


def invariant_matmul(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, whole: bool | None = None
) -> torch.Tensor:
    """Return `x @ weight.T + bias`, summed in fp32; a row's bits are the same whatever the others are.

    Args:
        x: `[M, K]`, last dimension contiguous.
        weight: `[N, K]` contiguous.
        bias: `[N]` or None.
        whole: whether a program does all runs of its tile; None = if that fills the device. No bit depends on it.

    Returns:
        `[M, N]` contiguous, in the dtype of `x`.
    """
    num_rows, (outputs, inputs) = x.shape[0], weight.shape
    out = torch.empty((num_rows, outputs), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    small, large = _tiles(current_target(), x.element_size())
    runs = num_runs_of(outputs, inputs, small.outputs, small.inputs)
    tile = small if num_rows <= small.rows else large
    tiles = triton.cdiv(num_rows, tile.rows) * triton.cdiv(outputs, tile.outputs)
    if whole is None:
        whole = tiles >= _PROGRAMS // 2
    whole = whole or runs == 1
    run_length = triton.cdiv(triton.cdiv(inputs, runs), small.inputs) * small.inputs
    target = out
    if not whole:
        target = torch.empty((runs, num_rows, outputs), dtype=torch.float32, device=x.device)
    has_bias = bias is not None
    invariant_linear_kernel[(tiles, 1 if whole else runs)](
        x, weight, bias if has_bias else weight, target, num_rows, runs, x.stride(0),
        N=outputs, K=inputs, RUN=run_length, BLOCK_M=tile.rows, BLOCK_N=tile.outputs, BLOCK_K=tile.inputs,
        TOGETHER=_ROW_TILES_TOGETHER, HAS_BIAS=has_bias, WHOLE=whole, STAGES=tile.stages, num_warps=tile.warps,
        enable_fp_fusion=False,
    )  # fmt: skip
    if not whole:
        add_runs_kernel[(num_rows, triton.cdiv(outputs, _REDUCE_BLOCK))](
            target, bias if has_bias else weight, out, runs, N=outputs, BLOCK=_REDUCE_BLOCK, HAS_BIAS=has_bias,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


class InvariantLinear:
    """Row-major weight; see the module."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight.contiguous()
        self._bias = bias

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        """`x @ weight.T + bias`: `[T, K]` -> `[T, N]`."""
        return invariant_matmul(x, self._weight, self._bias)


def invariant_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> InvariantLinear:
    """Wraps a weight `[out, in]` without copying it."""
    return InvariantLinear(weight, bias)
