"""Attention of prompt chunks on Hopper: what `prefill_attention` computes, with each warp given one role.

Two warp groups of 64 rows each share the K and V tiles that a third role copies (`hopper_work`). A warp group issues
the next tile's scores before the last tile's sums, and computes the softmax of the one while the matrix unit works on
the other (Shah et al. 2024). Written in Gluon, Triton's lower level, because Triton waits for both products at once.

Every tile begins at a multiple of 128 tokens and is folded in ascending order, so a row's bits depend on its sequence
alone, not on how the prompt was cut into chunks.
"""
# mypy: allow-untyped-calls, disable-error-code="no-untyped-def, untyped-decorator, misc"

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.triton.hopper_work import PANEL, TILE_TOKENS, copy_tiles, item_of, live_blocks, locate
from kernels.triton.target import current_target, num_processors

_GROUP_ROWS = gl.constexpr(64)
"""Query rows of a warp group: query tokens x the query heads of a KV head."""
_STRIP_ROWS = gl.constexpr(16)
_STAGES = 3
"""Buffers of K, and of V: what shared memory holds beside the queries at a head of 128."""


@gluon.jit
def fold_scores(
    scores,  # fp32 [64, 128], unscaled
    row_max,  # fp32 [64], of the scaled scores, base 2
    row_sum,  # fp32 [64]
    start,
    limit,  # int32 [64], tokens that each row sees
    scale_log2,
    S: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Return the tile's weights, the factor on what was summed before, and the new maximum and sum of each row."""
    if MASKED:
        token = start + gl.arange(0, TILE_TOKENS, gl.SliceLayout(0, S))
        scores = gl.where(token[None, :] < limit[:, None], scores, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(scores, 1) * scale_log2)
    base = new_max
    if MASKED:  # a row that has seen nothing yet: 0 instead keeps exp2 away from -inf + inf
        base = gl.where(new_max == float("-inf"), 0.0, new_max)
    weights = gl.exp2(scores * scale_log2 - base[:, None])
    rescale = gl.exp2(row_max - base)
    return weights, rescale, new_max, row_sum * rescale + gl.sum(weights, 1)


@gluon.jit
def fold_tile(
    q,  # shared [64, D]
    k_tiles,  # shared [stages, 128, D]
    v_tiles,
    k_full,
    k_empty,
    v_full,
    v_empty,
    t,  # tiles since the program began
    weights,  # [64, 128], of the tile before: its sum is still owed
    acc,  # fp32 [64, D], unnormalised output of the tiles before that
    row_max,
    row_sum,
    start,
    hi,
    limit,
    scale_log2,
    S: gl.constexpr,
    O: gl.constexpr,  # noqa: E741
    STAGES: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Scores of tile `t`, whose keys must have arrived, beside the sums of tile `t - 1`; waits for the next keys."""
    stage = t % STAGES
    before = (t - 1) % STAGES
    zeros = gl.zeros([_GROUP_ROWS, TILE_TOKENS], gl.float32, S)
    scores = warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), ((t - 1) // STAGES) & 1)
    acc = warpgroup_mma(weights, v_tiles.index(before), acc, is_async=True)
    scores = warpgroup_mma_wait(num_outstanding=1, deps=(scores,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    new_weights, rescale, row_max, row_sum = fold_scores(scores, row_max, row_sum, start, limit, scale_log2, S, MASKED)
    new_weights = gl.convert_layout(new_weights.to(weights.dtype), gl.DotOperandLayout(0, O, 2))
    # This wait is needed, and it is needed here: the assembler would move the next one before the softmax above, with
    # nothing left to overlap, but it moves nothing across a loop, and waiting at a barrier is one.
    mbarrier.wait(k_full.index((t + 1) % STAGES), ((t + 1) // STAGES) & 1, pred=start + TILE_TOKENS < hi)
    acc, weights, new_weights = warpgroup_mma_wait(num_outstanding=0, deps=(acc, weights, new_weights))
    mbarrier.arrive(v_empty.index(before), count=1)
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, O))[:, None]
    return new_weights, acc, row_max, row_sum


@gluon.jit
def clear_tail(
    v_strips,  # shared [stages * panels * strips, 16, PANEL]
    stage,
    tail,  # tokens of the sequence in and after the tile
    PANELS: gl.constexpr,
):
    """Zero the values past the sequence's end: a block's unused rest may hold anything, NaN included.

    Both warp groups do it, each before its own product: they store the same.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    strips: gl.constexpr = TILE_TOKENS // _STRIP_ROWS
    row = gl.arange(0, _STRIP_ROWS, gl.SliceLayout(1, layout))
    for strip in range(tail // _STRIP_ROWS, strips):
        for panel in gl.static_range(PANELS):
            piece = v_strips.index((stage * PANELS + panel) * strips + strip)
            piece.store(gl.where((row < tail - strip * _STRIP_ROWS)[:, None], piece.load(layout), 0.0))
    fence_async_shared()


@gluon.jit
def find_rows(
    group: gl.constexpr,
    query_start,
    seq,
    block,
    G: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    layout: gl.constexpr,
):
    """Return each row's query token, its query head within the KV head's, and whether the row is one."""
    first = gl.load(query_start + seq)
    q_len = gl.load(query_start + seq + 1) - first
    r = group * _GROUP_ROWS + gl.arange(0, _GROUP_ROWS, gl.SliceLayout(1, layout))
    position = block * BLOCK_Q + r // G
    return (first + position).to(gl.int64), r % G, ((r < BLOCK_Q * G) & (position < q_len))[:, None]


@gluon.jit
def attend_items(
    group: gl.constexpr,  # 0 or 1, which half of the rows
    q,  # shared [64, D], this group's own
    k_tiles,
    v_tiles,
    v_strips,
    k_full,
    k_empty,
    v_full,
    v_empty,
    query,
    query_start,
    seq_lens,
    out,
    scale_log2,
    query_stride,
    query_head_stride,
    num_seqs,
    Hq: gl.constexpr,
    Hk: gl.constexpr,
    G: gl.constexpr,
    D: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    MIN_Q: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A computing warp group: its half of the rows of every item."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])  # noqa: E741
    operand: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    copied: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    t = 0
    first_block, last_block = live_blocks(query_start, num_seqs, BLOCK_Q, MIN_Q, 4)
    num_items = (last_block - first_block) * Hk
    for turn in range(gl.cdiv(num_items, gl.num_programs(0))):
        item = item_of(turn)
        if item < num_items:
            head, seq, block, context, num_tokens, hi = locate(
                item, query_start, seq_lens, num_seqs, last_block, Hk, BLOCK_Q, MIN_Q, 4
            )
            if hi > 0:
                d = gl.arange(0, D, gl.SliceLayout(0, copied))
                token, q_head, used = find_rows(group, query_start, seq, block, G, BLOCK_Q, copied)
                q_row = token * query_stride + (head * G + q_head) * query_head_stride
                q.store(gl.load(query + q_row[:, None] + d[None, :], mask=used, other=0.0))
                fence_async_shared()

                row = group * _GROUP_ROWS + gl.arange(0, _GROUP_ROWS, gl.SliceLayout(1, S))
                limit = context + block * BLOCK_Q + row // G + 1
                border = (context + block * BLOCK_Q + 1) // TILE_TOKENS * TILE_TOKENS
                acc = gl.zeros([_GROUP_ROWS, D], gl.float32, O)
                row_max = gl.full([_GROUP_ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S))
                row_sum = gl.zeros([_GROUP_ROWS], gl.float32, gl.SliceLayout(1, S))
                stage = t % STAGES
                mbarrier.wait(k_full.index(stage), (t // STAGES) & 1)
                zeros = gl.zeros([_GROUP_ROWS, TILE_TOKENS], gl.float32, S)
                scores = warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
                scores = warpgroup_mma_wait(num_outstanding=0, deps=(scores,))
                mbarrier.arrive(k_empty.index(stage), count=1)
                weights, _rescale, row_max, row_sum = fold_scores(
                    scores, row_max, row_sum, 0, limit, scale_log2, S, True
                )
                weights = gl.convert_layout(weights.to(q.dtype), operand)
                t += 1
                mbarrier.wait(k_full.index(t % STAGES), (t // STAGES) & 1, pred=hi > TILE_TOKENS)
                for start in range(TILE_TOKENS, border, TILE_TOKENS):
                    weights, acc, row_max, row_sum = fold_tile(
                        q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, t, weights, acc, row_max, row_sum,
                        start, hi, limit, scale_log2, S, O, STAGES, False,
                    )  # fmt: skip
                    t += 1
                for start in range(gl.maximum(border, TILE_TOKENS), hi, TILE_TOKENS):
                    weights, acc, row_max, row_sum = fold_tile(
                        q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, t, weights, acc, row_max, row_sum,
                        start, hi, limit, scale_log2, S, O, STAGES, True,
                    )  # fmt: skip
                    t += 1

                stage = (t - 1) % STAGES
                mbarrier.wait(v_full.index(stage), ((t - 1) // STAGES) & 1)
                clear_tail(v_strips, stage, num_tokens - (hi - 1) // TILE_TOKENS * TILE_TOKENS, D // PANEL)
                acc = warpgroup_mma(weights, v_tiles.index(stage), acc, is_async=True)
                acc, weights = warpgroup_mma_wait(num_outstanding=0, deps=(acc, weights))
                mbarrier.arrive(v_empty.index(stage), count=1)
                total = gl.convert_layout(row_sum, gl.SliceLayout(1, O))
                q.store((acc / total[:, None]).to(q.dtype))  # through shared memory: whole rows go out at once
                # Found anew: kept since the queries were read, they would take registers from all the tiles between.
                token, q_head, used = find_rows(group, query_start, seq, block, G, BLOCK_Q, copied)
                out_row = token * Hq + head * G + q_head
                gl.store(out + out_row[:, None] * D + d[None, :], q.load(copied), mask=used)


@gluon.jit(do_not_specialize=["rows_per_block", "value_rows", "table_stride", "num_seqs"])
def prefill_hopper_kernel(
    query,  # [T, Hq, D]
    rows,  # descriptor of [token rows, Hk * D], blocks [SPAN, PANEL]
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
    Hq: gl.constexpr,
    Hk: gl.constexpr,
    G: gl.constexpr,
    D: gl.constexpr,
    PAGE: gl.constexpr,
    SPAN: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    MIN_Q: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Grid: persistent programs. Sequences of fewer than MIN_Q query tokens are left to the decode kernel."""
    dtype: gl.constexpr = query.dtype.element_ty
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    panels: gl.constexpr = STAGES * (D // PANEL)
    q0 = gl.allocate_shared_memory(dtype, [_GROUP_ROWS, D], swizzled)
    q1 = gl.allocate_shared_memory(dtype, [_GROUP_ROWS, D], swizzled)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE_TOKENS, D], swizzled)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE_TOKENS, D], swizzled)
    # A tile lies in panels of 64 columns, a panel in its rows: a page's part of a panel is one piece of memory.
    k_pieces = k_tiles._reinterpret(dtype, [panels * (TILE_TOKENS // SPAN), SPAN, PANEL], swizzled)
    v_pieces = v_tiles._reinterpret(dtype, [panels * (TILE_TOKENS // SPAN), SPAN, PANEL], swizzled)
    v_strips = v_tiles._reinterpret(dtype, [panels * (TILE_TOKENS // _STRIP_ROWS), _STRIP_ROWS, PANEL], swizzled)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                attend_items,
                (
                    0, q0, k_tiles, v_tiles, v_strips, k_full, k_empty, v_full, v_empty, query, query_start, seq_lens,
                    out, scale_log2, query_stride, query_head_stride, num_seqs, Hq, Hk, G, D, BLOCK_Q,
                    MIN_Q, STAGES,
                ),
            ),
            (
                attend_items,
                (
                    1, q1, k_tiles, v_tiles, v_strips, k_full, k_empty, v_full, v_empty, query, query_start, seq_lens,
                    out, scale_log2, query_stride, query_head_stride, num_seqs, Hq, Hk, G, D, BLOCK_Q,
                    MIN_Q, STAGES,
                ),
            ),
            (
                copy_tiles,
                (
                    rows, block_tables, query_start, seq_lens, k_pieces, v_pieces, k_full, k_empty, v_full, v_empty,
                    rows_per_block, value_rows, table_stride, num_seqs, Hk, D, PAGE, SPAN, BLOCK_Q,
                    MIN_Q, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def takes(query: torch.Tensor, kv_cache: torch.Tensor) -> bool:
    """Whether the kernel exists for these: Hopper, 16-bit elements, a head of 64 or 128, whole rows side by side."""
    target = current_target()
    head_dim, page = query.shape[2], kv_cache.shape[2]
    return (
        target.arch == 90
        and not target.is_interpreted
        and kv_cache.dtype == query.dtype
        and query.dtype in (torch.bfloat16, torch.float16)
        and head_dim in (64, 128)
        and page >= 16
        and query.shape[1] // kv_cache.shape[3] <= 2 * _GROUP_ROWS.value
        and kv_cache.stride()[2:] == (kv_cache.shape[3] * head_dim, head_dim, 1)
    )


def prefill_hopper_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    min_query_len: int,
) -> None:
    """Write what `prefill_attention` writes, for what it `takes`. Arguments as there."""
    num_tokens, num_q_heads, head_dim = query.shape
    num_seqs = seq_lens.shape[0]
    num_blocks, _, page, num_kv_heads, _ = kv_cache.shape
    group = num_q_heads // num_kv_heads
    block_stride, value_offset, row_stride = kv_cache.stride()[:3]
    rows_per_block, value_rows = block_stride // row_stride, value_offset // row_stride
    matrix = kv_cache.as_strided(
        ((num_blocks - 1) * rows_per_block + value_rows + page, num_kv_heads * head_dim), (row_stride, 1)
    )
    span = min(page, TILE_TOKENS.value)
    swizzled = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    rows = TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [span, PANEL.value], swizzled)
    block_q = 2 * _GROUP_ROWS.value // group
    programs = min(num_processors(query.device), (num_tokens // block_q + num_seqs) * num_kv_heads)
    prefill_hopper_kernel[(programs,)](
        query, rows, block_tables, query_start, seq_lens, out, scale * math.log2(math.e),
        query.stride(0), query.stride(1), rows_per_block, value_rows, block_tables.stride(0), num_seqs,
        Hq=num_q_heads, Hk=num_kv_heads, G=group, D=head_dim, PAGE=page, SPAN=span, BLOCK_Q=block_q,
        MIN_Q=min_query_len, STAGES=_STAGES, num_warps=4,
    )  # fmt: skip
