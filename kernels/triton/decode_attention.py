"""Attention of a few query tokens per sequence over a long paged cache: split-KV, then merge.

A program owns one sequence, one KV head and one run of the sequence's tokens. The query heads that share the KV head
and the query tokens are the rows of one tile, so K and V are read once for all of them. When one run covers the whole
sequence the program writes the output itself; otherwise a second kernel merges the runs by their log-sum-exp.
"""
# mypy: allow-untyped-calls, disable-error-code="no-untyped-def, untyped-decorator, misc"

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.triton.attention_loop import attend, load_pages, operand
from kernels.triton.target import Target, current_target, num_processors, overlapped

MAX_DECODE_QUERY_LEN = 8
"""Longest run of query tokens of one sequence that the decode kernel takes."""

_MAX_SPLITS = 64
_PROGRAMS_PER_PROCESSOR = 2
_PROGRAM_COST_TOKENS = 96
"""Start and end of a program, in tokens of K and V it could have read meanwhile (about 3 us on an H200)."""
_MERGE_COST_TOKENS = 96
_LONGEST_SPLIT = 2048
"""Batches are ragged and only the longest length is known here: bounds what one long sequence adds to the end."""


@triton.jit
def _split_length(num_tokens, num_splits, min_split, BLOCK_N: tl.constexpr):
    """Return the tokens per split: an even share, whole tiles, not below `min_split`."""
    return tl.maximum(tl.cdiv(tl.cdiv(num_tokens, num_splits), BLOCK_N) * BLOCK_N, min_split)


@triton.jit(do_not_specialize=["table_stride", "num_splits", "min_split"])
def decode_split_kernel(
    query,  # [T, Hq, D]
    cache,  # [num_blocks, 2, PAGE, Hk, D]
    block_tables,  # int32 [S, max_blocks]
    query_start,  # int32 [S + 1]
    seq_lens,  # int32 [S]
    out,  # [T, Hq, D] if DIRECT, else fp32 [T, Hq, num_splits, D]
    lse,  # fp32 [T, Hq, num_splits]; not touched if DIRECT
    scale_log2,
    query_stride,
    query_head_stride,
    block_stride,
    value_offset,
    row_stride,
    head_stride,
    table_stride,
    num_splits,
    min_split,
    Hq: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAX_Q: tl.constexpr,
    DIRECT: tl.constexpr,
    OVERLAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (kv head, split, sequence). Sequences of more than MAX_Q query tokens are left to the prefill kernel."""
    if OVERLAP:
        gdc_wait()
    head = tl.program_id(0)
    split = tl.program_id(1)
    seq = tl.program_id(2)
    first = tl.load(query_start + seq)
    q_len = tl.load(query_start + seq + 1) - first
    if (q_len > MAX_Q) | (q_len == 0):
        return
    num_tokens = tl.load(seq_lens + seq)
    split_len = _split_length(num_tokens, num_splits, min_split, BLOCK_N)
    lo = split * split_len
    if (lo >= num_tokens) & (split > 0):
        return
    hi = tl.minimum(lo + split_len, num_tokens)
    if OVERLAP:  # once the last program runs, let the merge be launched: it waits on the device, not in the queue
        gdc_launch_dependents()

    r = tl.arange(0, BLOCK_M)
    d = tl.arange(0, D_PAD)
    token = first + r // G
    q_head = head * G + r % G
    used = (r < q_len * G)[:, None] & (d < D)[None, :]
    q_row = token.to(tl.int64) * query_stride + q_head * query_head_stride
    q = operand(tl.load(query + q_row[:, None] + d[None, :], mask=used, other=0.0), cache.dtype.element_ty)

    limit = tl.minimum(num_tokens - q_len + r // G + 1, hi)
    visible_to_all = tl.maximum(tl.minimum(hi, num_tokens - q_len + 1) - lo, 0)
    border = lo + visible_to_all // BLOCK_N * BLOCK_N
    last_page = tl.maximum(num_tokens - 1, 0) // PAGE
    table = block_tables + seq.to(tl.int64) * table_stride
    keys = cache + head * head_stride
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    pages = load_pages(table, lo, last_page, PAGE, BLOCK_N)
    acc, row_max, row_sum, pages = attend(
        q, acc, row_max, row_sum, pages, table, keys, value_offset, block_stride, row_stride, lo, border, last_page,
        limit, scale_log2, D, D_PAD, PAGE, BLOCK_N, MASKED=False, STAGES=STAGES,
    )  # fmt: skip
    acc, row_max, row_sum, pages = attend(
        q, acc, row_max, row_sum, pages, table, keys, value_offset, block_stride, row_stride, border, hi, last_page,
        limit, scale_log2, D, D_PAD, PAGE, BLOCK_N, MASKED=True, STAGES=1,
    )  # fmt: skip

    result = acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
    out_row = token.to(tl.int64) * Hq + q_head
    if DIRECT:
        tl.store(out + out_row[:, None] * D + d[None, :], result.to(out.dtype.element_ty), mask=used)
    else:
        slot = out_row * num_splits + split
        tl.store(out + slot[:, None] * D + d[None, :], result, mask=used)
        tl.store(lse + slot, row_max + tl.log2(row_sum), mask=r < q_len * G)


@triton.jit(do_not_specialize=["num_splits", "min_split"])
def decode_merge_kernel(
    partial,  # fp32 [T, Hq, num_splits, D]
    lse,  # fp32 [T, Hq, num_splits], base 2
    query_start,  # int32 [S + 1]
    seq_lens,  # int32 [S]
    out,  # [T, Hq, D]
    num_splits,
    min_split,
    Hq: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    MAX_Q: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (query head, query token, sequence). Splits are folded in ascending order, whatever their number."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    head = tl.program_id(0)
    seq = tl.program_id(2)
    first = tl.load(query_start + seq)
    q_len = tl.load(query_start + seq + 1) - first
    if (q_len > MAX_Q) | (tl.program_id(1) >= q_len):
        return
    num_tokens = tl.load(seq_lens + seq)
    used = tl.maximum(tl.cdiv(num_tokens, _split_length(num_tokens, num_splits, min_split, BLOCK_N)), 1)
    row = (first + tl.program_id(1)).to(tl.int64) * Hq + head
    d = tl.arange(0, D_PAD)
    best = float("-inf")
    total = 0.0
    acc = tl.zeros([D_PAD], tl.float32)
    for start in range(0, used, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        part_lse = tl.load(lse + row * num_splits + s, mask=s < used, other=float("-inf"))
        part = tl.load(
            partial + (row * num_splits + s)[:, None] * D + d[None, :],
            mask=(s < used)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        new_best = tl.maximum(best, tl.max(part_lse, 0))
        base = tl.where(new_best == float("-inf"), 0.0, new_best)
        weight = tl.exp2(part_lse - base)
        rescale = tl.exp2(best - base)
        total = total * rescale + tl.sum(weight, 0)
        acc = acc * rescale + tl.sum(part * weight[:, None], 0)
        best = new_best
    acc = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + row * D + d, acc.to(out.dtype.element_ty), mask=d < D)


@functools.lru_cache(maxsize=4096)
def choose_num_splits(programs: int, max_seq_len: int, tile: int, slots: int) -> int:
    """Return how many runs to cut each sequence into.

    Minimises waves x (tokens per program + fixed cost), plus the merge, over the counts whose runs are at most 2,048
    and at least two tiles long. Everything it needs is known on the host, so no launch waits for the device.

    Args:
        programs: sequences x KV heads.
        max_seq_len: longest sequence of the batch, in tokens.
        tile: tokens per tile.
        slots: programs that the device runs at once.
    """
    most = max(1, min(_MAX_SPLITS, max_seq_len // (2 * tile)))
    least = min(most, -(-max_seq_len // _LONGEST_SPLIT))

    def cost(splits: int) -> float:
        waves = math.ceil(programs * splits / slots)
        merge = _MERGE_COST_TOKENS if splits > 1 else 0
        return waves * (math.ceil(max_seq_len / splits) + _PROGRAM_COST_TOKENS) + merge

    return min(range(least, most + 1), key=cost)


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """How a launch is cut.

    Attributes:
        tokens: of a K or V tile.
        warps: per program.
        stages: of the software pipeline.
        splits: runs that the longest sequence is cut into.
    """

    tokens: int
    warps: int
    stages: int
    splits: int


@functools.cache
def _tile(target: Target, d_pad: int, cache_bytes: int, rows: int) -> tuple[int, int]:
    """Return (tokens per tile, warps)."""
    if target.is_amd:
        return max(16, min(64, 4096 // d_pad)), 4
    return max(16, min(128, 16384 // (d_pad * cache_bytes))), 8 if rows >= 64 and d_pad >= 128 else 4


def _stages(target: Target, head_dim: int, programs: int, slots: int) -> int:
    """Return the pipeline depth: deeper where programs queue for their turn, if shared memory for two of them allows.

    Two programs with four stages hold as much of a Hopper multiprocessor as three with three do; the third helps while
    everything runs at once and is a ragged last wave after that.
    A padded head on Blackwell takes four also where everything runs at once: with three it spills registers (Triton
    3.7.1), and two programs with four have more tiles on the way than two with three.
    """
    if target.is_amd:
        return 2
    d_pad = triton.next_power_of_2(head_dim)
    spills_with_three = d_pad < 128 or (target.arch >= 100 and head_dim < d_pad)  # by the compiler's whim
    is_deep = programs > slots or spills_with_three
    return 4 if is_deep and target.shared_bytes > 200 * 1024 else 3


def choose_plan(
    query: torch.Tensor, kv_cache: torch.Tensor, *, num_seqs: int, rows: int, max_seq_len: int
) -> DecodePlan:
    """Return the plan of a batch, from shapes and lengths that the host knows.

    Args:
        query: `[T, Hq, D]`.
        kv_cache: `[num_blocks, 2, block_size, Hk, D]`.
        num_seqs: of the batch.
        rows: of the query tile.
        max_seq_len: upper bound of the sequences' lengths.
    """
    target, d_pad = current_target(), triton.next_power_of_2(query.shape[2])
    tokens, warps = _tile(target, d_pad, kv_cache.element_size(), rows)
    slots = num_processors(query.device) * _PROGRAMS_PER_PROCESSOR
    programs = num_seqs * kv_cache.shape[3]
    splits = choose_num_splits(programs, triton.cdiv(max_seq_len, 256) * 256, tokens, slots)
    return DecodePlan(tokens, warps, _stages(target, query.shape[2], programs * splits, slots), splits)


def decode_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    max_query_len: int,
    max_seq_len: int,
    plan: DecodePlan | None = None,
) -> None:
    """Write the attention output of every sequence of 1 .. `max_query_len` query tokens into `out`.

    Args:
        query: `[T, Hq, D]`, last dimension contiguous.
        kv_cache: `[num_blocks, 2, block_size, Hk, D]`, one layer's view of the arena, or fp8 of the same shape.
        block_tables: int32 `[S, max_blocks]`.
        query_start: int32 `[S + 1]`.
        seq_lens: int32 `[S]`; 0 (a padding row) gives zeros.
        out: `[T, Hq, D]` contiguous; rows of longer sequences are not touched.
        scale: factor on the scores before the softmax.
        max_query_len: at most MAX_DECODE_QUERY_LEN.
        max_seq_len: upper bound of `seq_lens`, known on the host.
        plan: overrides the choice, for measurements.
    """
    num_tokens, num_q_heads, head_dim = query.shape
    num_seqs = seq_lens.shape[0]
    page, num_kv_heads = kv_cache.shape[2], kv_cache.shape[3]
    group = num_q_heads // num_kv_heads
    d_pad = triton.next_power_of_2(head_dim)
    max_q = triton.next_power_of_2(max_query_len)
    rows = max(16, triton.next_power_of_2(max_q * group))
    target = current_target()
    if plan is None:
        plan = choose_plan(query, kv_cache, num_seqs=num_seqs, rows=rows, max_seq_len=max_seq_len)
    splits, min_split = plan.splits, 2 * plan.tokens
    direct = splits == 1
    # Alone on the device it wants its programs spread evenly, not wherever the kernel before has left room.
    overlap = target.overlaps_launches and not direct
    partial, lse = out, out
    if not direct:
        partial = torch.empty((num_tokens, num_q_heads, splits, head_dim), dtype=torch.float32, device=query.device)
        lse = torch.empty((num_tokens, num_q_heads, splits), dtype=torch.float32, device=query.device)
    decode_split_kernel[(num_kv_heads, splits, num_seqs)](
        query, kv_cache, block_tables, query_start, seq_lens, partial, lse, scale * math.log2(math.e),
        query.stride(0), query.stride(1), kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2),
        kv_cache.stride(3), block_tables.stride(0), splits, min_split,
        Hq=num_q_heads, G=group, D=head_dim, D_PAD=d_pad, PAGE=page, BLOCK_M=rows, BLOCK_N=plan.tokens,
        MAX_Q=max_q, DIRECT=direct, OVERLAP=overlap, STAGES=plan.stages, num_warps=plan.warps, **overlapped(overlap),
    )  # fmt: skip
    if not direct:
        decode_merge_kernel[(num_q_heads, max_q, num_seqs)](
            partial, lse, query_start, seq_lens, out, splits, min_split,
            Hq=num_q_heads, D=head_dim, D_PAD=d_pad, BLOCK_N=plan.tokens, BLOCK_S=4096 // d_pad,
            MAX_Q=max_q, OVERLAP=overlap, num_warps=4, **overlapped(overlap),
        )  # fmt: skip
