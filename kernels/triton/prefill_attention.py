"""Causal attention of prompt chunks over the paged cache, in tiles of 128 rows.

The rows of a tile are query tokens x the query heads of one KV head: each K and V tile is read once for all of them,
and the products are large enough for whole warp groups (wgmma) or a whole processor (tcgen05).

The grid is flat over query blocks of all sequences: block `i` of sequence `s` has the index
`query_start[s] // BLOCK_Q + s + i`, which needs no prefix sum on the host and leaves at most one idle program per
sequence and KV head.
"""
# mypy: allow-untyped-calls, disable-error-code="no-untyped-def, untyped-decorator, misc"

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.triton.attention_loop import attend, load_pages, operand
from kernels.triton.target import Target, current_target

_SHORT_TOKENS = 4096
"""Up to this length the smaller tiles win on an H200 (by 2 % at 4,096, by a fifth at 512)."""


@triton.jit
def find_sequence(query_start, index, num_seqs, BLOCK_Q: tl.constexpr):
    """Return the sequence that owns query block `index`: the last `s` with `query_start[s] // BLOCK_Q + s <= index`."""
    found = 0
    for start in range(0, num_seqs, 128):
        s = start + tl.arange(0, 128)
        first = tl.load(query_start + s, mask=s < num_seqs, other=0)
        found += tl.sum(((first // BLOCK_Q + s <= index) & (s < num_seqs)).to(tl.int32), 0)
    return found - 1


@triton.jit(do_not_specialize=["num_seqs", "table_stride"])
def prefill_kernel(
    query,  # [T, Hq, D]
    cache,  # [num_blocks, 2, PAGE, Hk, D]
    block_tables,  # int32 [S, max_blocks]
    query_start,  # int32 [S + 1]
    seq_lens,  # int32 [S]
    out,  # [T, Hq, D]
    scale_log2,
    query_stride,
    query_head_stride,
    block_stride,
    value_offset,
    row_stride,
    head_stride,
    table_stride,
    num_seqs,
    Hq: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_Q: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (kv head, query block). Sequences of fewer than MIN_Q query tokens are left to the decode kernel."""
    head = tl.program_id(0)
    index = tl.num_programs(1) - 1 - tl.program_id(1)  # the longest rows start first: a shorter tail
    seq = find_sequence(query_start, index, num_seqs, BLOCK_Q)
    first = tl.load(query_start + seq)
    q_len = tl.load(query_start + seq + 1) - first
    block = index - (first // BLOCK_Q + seq)
    if (block * BLOCK_Q >= q_len) | (q_len < MIN_Q):
        return
    num_tokens = tl.load(seq_lens + seq)
    context = num_tokens - q_len

    r = tl.arange(0, BLOCK_M)
    d = tl.arange(0, D_PAD)
    position = block * BLOCK_Q + r // G
    q_head = head * G + r % G
    used = ((r < BLOCK_Q * G) & (position < q_len))[:, None] & (d < D)[None, :]
    token = (first + position).to(tl.int64)
    q_row = token * query_stride + q_head * query_head_stride
    q = operand(tl.load(query + q_row[:, None] + d[None, :], mask=used, other=0.0), cache.dtype.element_ty)

    limit = context + position + 1
    hi = tl.minimum(context + (block + 1) * BLOCK_Q, num_tokens)
    border = (context + block * BLOCK_Q + 1) // BLOCK_N * BLOCK_N
    last_page = (num_tokens - 1) // PAGE
    table = block_tables + seq.to(tl.int64) * table_stride
    keys = cache + head * head_stride
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    pages = load_pages(table, 0, last_page, PAGE, BLOCK_N)
    acc, row_max, row_sum, pages = attend(
        q, acc, row_max, row_sum, pages, table, keys, value_offset, block_stride, row_stride, 0, border, last_page,
        limit, scale_log2, D, D_PAD, PAGE, BLOCK_N, MASKED=False, STAGES=STAGES,
    )  # fmt: skip
    acc, row_max, row_sum, pages = attend(
        q, acc, row_max, row_sum, pages, table, keys, value_offset, block_stride, row_stride, border, hi, last_page,
        limit, scale_log2, D, D_PAD, PAGE, BLOCK_N, MASKED=True, STAGES=1,
    )  # fmt: skip
    out_row = token * Hq + q_head
    tl.store(out + out_row[:, None] * D + d[None, :], (acc / row_sum[:, None]).to(out.dtype.element_ty), mask=used)


@dataclass(frozen=True, slots=True)
class PrefillTile:
    """How a launch is cut.

    Attributes:
        rows: query tokens x the query heads of a KV head.
        tokens: of a K or V tile.
        warps: per program.
        stages: of the software pipeline.
    """

    rows: int
    tokens: int
    warps: int
    stages: int


@functools.cache
def choose_tile(target: Target, d_pad: int, operand_bytes: int, is_short: bool) -> PrefillTile:
    """Return the largest tile that compiles without spilling registers.

    Short sequences leave little to overlap within a program, so there two smaller programs share a multiprocessor.
    """
    if target.is_amd:
        return PrefillTile(128, max(16, min(64, 4096 // d_pad)), 8, 2)
    if operand_bytes == 4:
        return PrefillTile(128, 16, 8, 2)
    if target.has_wgmma:
        if d_pad > 128:
            return PrefillTile(128, 32, 8, 3)
        return PrefillTile(64, 64, 4, 3) if is_short else PrefillTile(128, 128, 8, 3)
    return PrefillTile(128, max(32, 4096 // d_pad), 8, 2) if d_pad <= 128 else PrefillTile(32, 32, 4, 2)


def prefill_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    min_query_len: int,
    max_seq_len: int,
    tile: PrefillTile | None = None,
) -> None:
    """Write the attention output of every sequence of at least `min_query_len` query tokens into `out`.

    The chunk's own keys and values must already be in the cache. Arguments as in `decode_attention`; a sequence's
    result depends on nothing but the sequence, where its chunk begins, and whether `max_seq_len` chose small tiles.
    `tile` overrides the choice, for measurements.
    """
    num_tokens, num_q_heads, head_dim = query.shape
    num_seqs = seq_lens.shape[0]
    page, num_kv_heads = kv_cache.shape[2], kv_cache.shape[3]
    group = num_q_heads // num_kv_heads
    d_pad = triton.next_power_of_2(head_dim)
    if tile is None:
        tile = choose_tile(current_target(), d_pad, query.element_size(), max_seq_len <= _SHORT_TOKENS)
    rows = max(tile.rows, triton.next_power_of_2(group))
    block_q = rows // group
    query_blocks = num_tokens // block_q + num_seqs
    prefill_kernel[(num_kv_heads, query_blocks)](
        query, kv_cache, block_tables, query_start, seq_lens, out, scale * math.log2(math.e),
        query.stride(0), query.stride(1), kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2),
        kv_cache.stride(3), block_tables.stride(0), num_seqs,
        Hq=num_q_heads, G=group, D=head_dim, D_PAD=d_pad, PAGE=page, BLOCK_M=rows, BLOCK_Q=block_q,
        BLOCK_N=tile.tokens, MIN_Q=min_query_len, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
