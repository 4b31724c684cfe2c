"""Attention of prompt chunks over large pages, whose K and V tiles are fetched by the copy engine (TMA).

A tile is a part of one page, so its place is two numbers instead of an address per 16 bytes: no thread computes
addresses, and K and V go to shared memory without passing a register. One descriptor covers keys and values of a layer:
a block is a whole number of token rows, so the arena is a matrix of rows from the layer's first key on. It waits to be
measured before it serves. (Loads with warps of their own are left out: Triton 3.6 fails to specialise these loops.)
"""
# mypy: allow-untyped-calls, disable-error-code="no-untyped-def, untyped-decorator, misc"

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.triton.prefill_attention import find_sequence


@triton.jit
def attend_tiles(
    q,  # [M, D]
    acc,  # fp32 [M, D]
    row_max,  # fp32 [M]
    row_sum,  # fp32 [M]
    table,  # int32 [max_blocks]
    rows,  # descriptor of [token rows, Hk * D]
    column,  # of the KV head
    rows_per_block,
    value_rows,  # from a key's row to its value's
    lo,
    hi,
    limit,  # int32 [M]
    scale_log2,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Fold tokens `[lo, hi)` into the running softmax; as `attend` does, without its page numbers."""
    for start in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        row = tl.load(table + start // PAGE) * rows_per_block + start % PAGE
        k = rows.load([row, column])
        scores = tl.dot(q, k.T, input_precision="ieee")
        token = start + tl.arange(0, BLOCK_N)
        if MASKED:
            scores = tl.where(token[None, :] < limit[:, None], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        base = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
        weights = tl.exp2(scores * scale_log2 - base[:, None])
        rescale = tl.exp2(row_max - base)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        v = rows.load([row + value_rows, column])
        if MASKED:  # what a block holds past the sequence's end may be anything, NaN included
            v = tl.where((token < hi)[:, None], v, 0.0)
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * rescale[:, None], input_precision="ieee")
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["num_seqs", "table_stride", "rows_per_block", "value_rows"])
def prefill_tma_kernel(
    query,  # [T, Hq, D]
    rows,  # descriptor of [token rows, Hk * D], blocks [BLOCK_N, D]
    block_tables,  # int32 [S, max_blocks]
    query_start,  # int32 [S + 1]
    seq_lens,  # int32 [S]
    out,  # [T, Hq, D]
    scale_log2,
    query_stride,
    query_head_stride,
    rows_per_block,
    value_rows,
    table_stride,
    num_seqs,
    Hq: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_Q: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (kv head, query block), as the prefill kernel's."""
    head = tl.program_id(0)
    index = tl.num_programs(1) - 1 - tl.program_id(1)
    seq = find_sequence(query_start, index, num_seqs, BLOCK_Q)
    first = tl.load(query_start + seq)
    q_len = tl.load(query_start + seq + 1) - first
    block = index - (first // BLOCK_Q + seq)
    if (block * BLOCK_Q >= q_len) | (q_len < MIN_Q):
        return
    num_tokens = tl.load(seq_lens + seq)
    context = num_tokens - q_len

    r = tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    position = block * BLOCK_Q + r // G
    q_head = head * G + r % G
    used = ((r < BLOCK_Q * G) & (position < q_len))[:, None]
    token = (first + position).to(tl.int64)
    q_row = token * query_stride + q_head * query_head_stride
    q = tl.load(query + q_row[:, None] + d[None, :], mask=used, other=0.0)

    limit = context + position + 1
    hi = tl.minimum(context + (block + 1) * BLOCK_Q, num_tokens)
    border = (context + block * BLOCK_Q + 1) // BLOCK_N * BLOCK_N
    table = block_tables + seq.to(tl.int64) * table_stride
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc, row_max, row_sum = attend_tiles(
        q, acc, row_max, row_sum, table, rows, head * D, rows_per_block, value_rows, 0, border, limit, scale_log2,
        PAGE, BLOCK_N, MASKED=False, STAGES=STAGES,
    )  # fmt: skip
    acc, row_max, row_sum = attend_tiles(
        q, acc, row_max, row_sum, table, rows, head * D, rows_per_block, value_rows, border, hi, limit, scale_log2,
        PAGE, BLOCK_N, MASKED=True, STAGES=1,
    )  # fmt: skip
    out_row = token * Hq + q_head
    tl.store(out + out_row[:, None] * D + d[None, :], (acc / row_sum[:, None]).to(out.dtype.element_ty), mask=used)


@dataclass(frozen=True, slots=True)
class TmaTile:
    """How a launch is cut.

    Attributes:
        rows: query tokens x the query heads of a KV head.
        tokens: of a K or V tile; at most a page.
    """

    rows: int = 128
    tokens: int = 128
    warps: int = 8
    stages: int = 3


def prefill_tma_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    min_query_len: int,
    tile: TmaTile,
) -> None:
    """Write what `prefill_attention` writes, on sm_90.

    The cache is bf16 or fp16, a page holds whole tiles, head_dim is a power of two. `tile` says how it is cut.
    """
    num_tokens, num_q_heads, head_dim = query.shape
    num_seqs = seq_lens.shape[0]
    num_blocks, _, page, num_kv_heads, _ = kv_cache.shape
    group = num_q_heads // num_kv_heads
    block_stride, value_offset, row_stride = kv_cache.stride()[:3]
    rows_per_block, value_rows = block_stride // row_stride, value_offset // row_stride
    matrix = kv_cache.as_strided(
        ((num_blocks - 1) * rows_per_block + value_rows + page, num_kv_heads * head_dim), (row_stride, 1)
    )
    descriptor = TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [tile.tokens, head_dim])
    block_q = tile.rows // group
    prefill_tma_kernel[(num_kv_heads, num_tokens // block_q + num_seqs)](
        query, descriptor, block_tables, query_start, seq_lens, out, scale * math.log2(math.e),
        query.stride(0), query.stride(1), rows_per_block, value_rows, block_tables.stride(0), num_seqs,
        Hq=num_q_heads, G=group, D=head_dim, PAGE=page, BLOCK_M=tile.rows, BLOCK_Q=block_q, BLOCK_N=tile.tokens,
        MIN_Q=min_query_len, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
