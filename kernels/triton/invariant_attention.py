"""Attention whose result for a token depends on nothing but the token's sequence: the attention op of invariant mode.

The tokens that a query sees are cut into runs of RUN_TOKENS, counted from the sequence's first. Each run is a softmax
of its own; the runs are folded into one result in ascending order. What differs between steps is only who computes:

    decode steps     a program takes some runs of a sequence, a second kernel folds
    prompt chunks    a program takes all runs of its rows and folds them itself

Both are one kernel with one tile, so the same matrix instruction meets the same operands in the same order. A row of a
tile does not see its neighbours; a token that a row must not see has the weight 0, and a run of such tokens is folded
in with the factor 0, which leaves every bit. Nothing is contracted (`enable_fp_fusion=False`): a product that is
rounded in one form of the kernel is rounded in the other.
"""
# mypy: allow-untyped-calls, disable-error-code="no-untyped-def, untyped-decorator, misc"

import functools
import math

import torch
import triton
import triton.language as tl

from kernels.triton.attention_loop import attend, load_pages, operand
from kernels.triton.decode_attention import MAX_DECODE_QUERY_LEN
from kernels.triton.prefill_attention import find_sequence
from kernels.triton.target import Target, current_target, num_processors

RUN_TOKENS = 512
"""Part of the numerics: another length gives other bits. Short enough that eight KV heads of one sequence of 4,096
tokens keep 64 programs busy, long enough that starting anew in a run costs little."""

_PROGRAMS_PER_PROCESSOR = 2


@triton.jit
def _fold(
    total,  # fp32 [M, D_PAD]
    total_max,  # fp32 [M]
    total_sum,  # fp32 [M]
    acc,  # fp32 [M, D_PAD]
    row_max,  # fp32 [M]
    row_sum,  # fp32 [M]
):
    """Return the total with one more run; a run that a row does not see at all leaves it as it is, bit by bit."""
    new_max = tl.maximum(total_max, row_max)
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    old_weight, new_weight = tl.exp2(total_max - base), tl.exp2(row_max - base)
    total = total * old_weight[:, None] + acc * new_weight[:, None]
    return total, new_max, total_sum * old_weight + row_sum * new_weight


@triton.jit(do_not_specialize=["num_seqs", "table_stride", "num_runs", "runs_per_program"])
def invariant_attention_kernel(
    query,  # [T, Hq, D]
    cache,  # [num_blocks, 2, PAGE, Hk, D]
    block_tables,  # int32 [S, max_blocks]
    query_start,  # int32 [S + 1]
    seq_lens,  # int32 [S]
    out,  # [T, Hq, D] if WHOLE, else fp32 [T, Hq, num_runs, D]
    maxima,  # fp32 [T, Hq, num_runs]; not touched if WHOLE
    sums,  # fp32 [T, Hq, num_runs]; not touched if WHOLE
    scale_log2,
    query_stride,
    query_head_stride,
    block_stride,
    value_offset,
    row_stride,
    head_stride,
    table_stride,
    num_seqs,
    num_runs,
    runs_per_program,
    Hq: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RUN: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (kv head, query block, group of runs); query blocks are numbered as in the prefill kernel."""
    head = tl.program_id(0)
    index = tl.num_programs(1) - 1 - tl.program_id(1)
    seq = find_sequence(query_start, index, num_seqs, BLOCK_Q)
    first = tl.load(query_start + seq)
    q_len = tl.load(query_start + seq + 1) - first
    block = index - (first // BLOCK_Q + seq)
    if block * BLOCK_Q >= q_len:
        return
    num_tokens = tl.load(seq_lens + seq)
    context = num_tokens - q_len

    r = tl.arange(0, BLOCK_M)
    d = tl.arange(0, D_PAD)
    position = block * BLOCK_Q + r // G
    q_head = head * G + r % G
    is_row = (r < BLOCK_Q * G) & (position < q_len)
    used = is_row[:, None] & (d < D)[None, :]
    token = (first + position).to(tl.int64)
    q_row = token * query_stride + q_head * query_head_stride
    q = operand(tl.load(query + q_row[:, None] + d[None, :], mask=used, other=0.0), cache.dtype.element_ty)

    limit = context + position + 1
    end = tl.minimum(context + (block + 1) * BLOCK_Q, num_tokens)
    visible_to_all = context + block * BLOCK_Q + 1
    last_page = tl.maximum(num_tokens - 1, 0) // PAGE
    table = block_tables + seq.to(tl.int64) * table_stride
    keys = cache + head * head_stride
    out_row = token * Hq + q_head
    total = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    total_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total_sum = tl.zeros([BLOCK_M], tl.float32)
    first_run = tl.program_id(2) * runs_per_program
    for run in tl.range(first_run, tl.minimum(first_run + runs_per_program, tl.cdiv(end, RUN)), num_stages=1):
        lo = run * RUN
        hi = tl.minimum(lo + RUN, end)
        border = lo + tl.maximum(tl.minimum(hi, visible_to_all) - lo, 0) // BLOCK_N * BLOCK_N
        acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        pages = load_pages(table, lo, last_page, PAGE, BLOCK_N)
        acc, row_max, row_sum, pages = attend(
            q, acc, row_max, row_sum, pages, table, keys, value_offset, block_stride, row_stride, lo, border,
            last_page, limit, scale_log2, D, D_PAD, PAGE, BLOCK_N, MASKED=False, STAGES=STAGES,
        )  # fmt: skip
        acc, row_max, row_sum, pages = attend(
            q, acc, row_max, row_sum, pages, table, keys, value_offset, block_stride, row_stride, border, hi,
            last_page, limit, scale_log2, D, D_PAD, PAGE, BLOCK_N, MASKED=True, STAGES=1,
        )  # fmt: skip
        if WHOLE:
            total, total_max, total_sum = _fold(total, total_max, total_sum, acc, row_max, row_sum)
        else:
            slot = out_row * num_runs + run
            tl.store(out + slot[:, None] * D + d[None, :], acc, mask=used)
            tl.store(maxima + slot, row_max, mask=is_row)
            tl.store(sums + slot, row_sum, mask=is_row)
    if WHOLE:
        result = total / tl.where(total_sum > 0, total_sum, 1.0)[:, None]
        tl.store(out + out_row[:, None] * D + d[None, :], result.to(out.dtype.element_ty), mask=used)


@triton.jit(do_not_specialize=["num_runs"])
def invariant_merge_kernel(
    partial,  # fp32 [T, Hq, num_runs, D]
    maxima,  # fp32 [T, Hq, num_runs], base 2
    sums,  # fp32 [T, Hq, num_runs]
    query_start,  # int32 [S + 1]
    seq_lens,  # int32 [S]
    out,  # [T, Hq, D]
    num_runs,
    Hq: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    RUN: tl.constexpr,
):
    """Grid (query head, query token, sequence): folds a row's runs as the kernel before would have."""
    head = tl.program_id(0)
    seq = tl.program_id(2)
    first = tl.load(query_start + seq)
    q_len = tl.load(query_start + seq + 1) - first
    if tl.program_id(1) >= q_len:
        return
    visible = tl.load(seq_lens + seq) - q_len + tl.program_id(1) + 1
    row = (first + tl.program_id(1)).to(tl.int64) * Hq + head
    one = tl.arange(0, 1)
    d = tl.arange(0, D_PAD)
    total = tl.zeros([1, D_PAD], tl.float32)
    total_max = tl.full([1], float("-inf"), tl.float32)
    total_sum = tl.zeros([1], tl.float32)
    for run in range(tl.cdiv(visible, RUN)):
        slot = row * num_runs + run + one
        acc = tl.load(partial + slot[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
        total, total_max, total_sum = _fold(
            total, total_max, total_sum, acc, tl.load(maxima + slot), tl.load(sums + slot)
        )
    result = total / tl.where(total_sum > 0, total_sum, 1.0)[:, None]
    tl.store(out + (row + one)[:, None] * D + d[None, :], result.to(out.dtype.element_ty), mask=(d < D)[None, :])


@functools.cache
def _tile(target: Target, d_pad: int, operand_bytes: int, cache_bytes: int) -> tuple[int, int, int, int]:
    """Return (rows, tokens per tile, warps, stages): one for all steps, since it decides about bits.

    Two accumulators, a run's and the total, leave registers for small tiles only.
    """
    if target.is_amd:
        return (64, 32, 4, 2) if d_pad <= 128 else (32, 16, 4, 2)
    if operand_bytes == 4:
        return 64, 16, 8, 2
    if d_pad > 128:
        return 16, 32, 4, 2
    return (64, 32, 4, 4) if target.arch == 90 and cache_bytes == 2 else (32, 32, 4, 2)


def choose_runs_per_program(programs: int, num_runs: int, slots: int) -> int:
    """Return how many runs a program of a decode step takes; any answer gives the same bits.

    Args:
        programs: sequences x KV heads.
        num_runs: of the longest sequence.
        slots: programs that the device runs at once.
    """
    return max(1, min(num_runs, programs * num_runs // slots))


def paged_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    max_query_len: int,
    max_seq_len: int,
) -> torch.Tensor:
    """As `kernels.triton.paged_attention`, with the same bits for a token in every batch and after any chunking."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    num_tokens, num_q_heads, head_dim = query.shape
    if num_tokens == 0:
        return out
    num_seqs = seq_lens.shape[0]
    num_kv_heads = kv_cache.shape[3]
    group = num_q_heads // num_kv_heads
    d_pad = triton.next_power_of_2(head_dim)
    rows, block_n, warps, stages = _tile(current_target(), d_pad, query.element_size(), kv_cache.element_size())
    rows = max(rows, triton.next_power_of_2(group))
    num_runs = max(1, triton.cdiv(max_seq_len, RUN_TOKENS))
    runs_per_program = num_runs
    if max_query_len <= MAX_DECODE_QUERY_LEN:
        slots = num_processors(query.device) * _PROGRAMS_PER_PROCESSOR
        runs_per_program = choose_runs_per_program(num_seqs * num_kv_heads, num_runs, slots)
    whole = runs_per_program == num_runs
    partial, maxima, sums = out, out, out
    if not whole:
        partial = torch.empty((num_tokens, num_q_heads, num_runs, head_dim), dtype=torch.float32, device=query.device)
        maxima, sums = torch.empty((2, num_tokens, num_q_heads, num_runs), dtype=torch.float32, device=query.device)
    grid = (num_kv_heads, num_tokens // (rows // group) + num_seqs, triton.cdiv(num_runs, runs_per_program))
    invariant_attention_kernel[grid](
        query, kv_cache, block_tables, query_start, seq_lens, partial, maxima, sums, scale * math.log2(math.e),
        query.stride(0), query.stride(1), kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2),
        kv_cache.stride(3), block_tables.stride(0), num_seqs, num_runs, runs_per_program,
        Hq=num_q_heads, G=group, D=head_dim, D_PAD=d_pad, PAGE=kv_cache.shape[2], BLOCK_M=rows, BLOCK_Q=rows // group,
        BLOCK_N=block_n, RUN=RUN_TOKENS, WHOLE=whole, STAGES=stages, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    if not whole:
        invariant_merge_kernel[(num_q_heads, max_query_len, num_seqs)](
            partial, maxima, sums, query_start, seq_lens, out, num_runs,
            Hq=num_q_heads, D=head_dim, D_PAD=d_pad, RUN=RUN_TOKENS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out
