"""The loop that both attention kernels share: one block of query rows over a run of cached tokens, paged.

The page numbers of the next tile travel in a loop variable. The K and V loads then depend on nothing that is loaded in
the same iteration, so the compiler's software pipeline keeps `num_stages - 1` tiles of both in flight; with the page
lookup inside the iteration it spends those stages on the lookup.
"""
# mypy: allow-untyped-calls, disable-error-code="no-untyped-def, untyped-decorator, misc"

import triton
import triton.language as tl


@triton.jit
def load_pages(
    table,  # int32 [max_blocks], the sequence's row of the block table
    start,  # first token of the tile
    last_page,  # index of the sequence's last block: lookups are clamped to it
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return the block ids under tokens `[start, start + BLOCK_N)`: int32 `[max(1, BLOCK_N // PAGE)]`."""
    NUM_PAGES: tl.constexpr = BLOCK_N // PAGE if BLOCK_N > PAGE else 1
    index = start // PAGE + tl.arange(0, NUM_PAGES)
    return tl.load(table + tl.minimum(index, last_page))


@triton.jit
def tile_rows(
    pages,  # int32 [max(1, BLOCK_N // PAGE)]
    start,
    block_stride,
    row_stride,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return the element offset of each token's K row within the cache: int64 `[BLOCK_N]`."""
    token = tl.arange(0, BLOCK_N)
    if BLOCK_N > PAGE:
        page = tl.broadcast_to(pages[:, None], [BLOCK_N // PAGE, PAGE]).reshape(BLOCK_N)
        offset = token % PAGE
    else:
        page = tl.broadcast_to(pages, [BLOCK_N])
        offset = start % PAGE + token
    return page.to(tl.int64) * block_stride + offset * row_stride


@triton.jit
def operand(
    q,  # [M, D_PAD]
    cache_type: tl.constexpr,
):
    """Return the queries in the type in which they are multiplied with the cache.

    Two fp8 values become fp16 in one instruction; bf16 takes four more, half of them from the slowest unit (sm_90).
    """
    if cache_type.is_fp8() and q.dtype == tl.bfloat16:
        q = q.to(tl.float16)
    return q


@triton.jit
def attend(
    q,  # [M, D_PAD]
    acc,  # fp32 [M, D_PAD], unnormalised output
    row_max,  # fp32 [M], running maximum of the scaled scores, base 2
    row_sum,  # fp32 [M]
    pages,  # block ids of the first tile
    table,  # int32 [max_blocks]
    keys,  # the layer's cache, at this KV head
    value_offset,  # elements from a K row to its V row
    block_stride,
    row_stride,
    lo,
    hi,
    last_page,
    limit,  # int32 [M], tokens that each row sees
    scale_log2,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Fold tokens `[lo, hi)` into the running softmax (Milakov and Gimelshein 2018; Dao 2023).

    With MASKED off, every row must see every token and `hi - lo` must be a multiple of BLOCK_N: no comparison is made.
    With MASKED on, tokens at or past `hi` are not read (a block's unused tail may hold anything, NaN included).

    Returns:
        acc, row_max, row_sum and the page numbers of the tile at `hi`.
    """
    d = tl.arange(0, D_PAD)
    for start in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        rows = tile_rows(pages, start, block_stride, row_stride, PAGE, BLOCK_N)
        pages = load_pages(table, start + BLOCK_N, last_page, PAGE, BLOCK_N)
        token = start + tl.arange(0, BLOCK_N)
        k_ptr = keys + rows[None, :] + d[:, None]
        v_ptr = keys + value_offset + rows[:, None] + d[None, :]
        if MASKED:
            k = tl.load(k_ptr, mask=(token < hi)[None, :] & (d < D)[:, None], other=0.0)
            v = tl.load(v_ptr, mask=(token < hi)[:, None] & (d < D)[None, :], other=0.0)
        elif D_PAD != D:
            k = tl.load(k_ptr, mask=(d < D)[:, None], other=0.0)
            v = tl.load(v_ptr, mask=(d < D)[None, :], other=0.0)
        else:
            k = tl.load(k_ptr)
            v = tl.load(v_ptr)
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee")
        if MASKED:
            scores = tl.where(token[None, :] < limit[:, None], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        # A row that has seen nothing yet has no maximum: 0 instead keeps exp2 away from -inf + inf.
        base = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
        weights = tl.exp2(scores * scale_log2 - base[:, None])
        rescale = tl.exp2(row_max - base)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * rescale[:, None], input_precision="ieee")
        row_max = new_max
    return acc, row_max, row_sum, pages
