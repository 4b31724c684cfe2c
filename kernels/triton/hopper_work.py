"""What the warps of a warp-specialised attention program share: the order of work items, and the warp that copies.

A program is three roles. One warp copies tiles of K and V into shared memory with the copy engine (TMA) and computes
nothing; two warp groups compute and copy nothing. For each tile there are two barriers: `full`, which the copy engine
completes, and `empty`, at which both warp groups arrive once they have read the tile.

Programs are persistent, one per multiprocessor. An item is a query block of one KV head; each role walks the same items
in the same order, so that the copies for the next item are under way while this one's results are still being written.
"""
# mypy: allow-untyped-calls, disable-error-code="no-untyped-def, untyped-decorator, misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

TILE_TOKENS = gl.constexpr(128)
"""Tokens of a K or V tile."""
PANEL = gl.constexpr(64)
"""Elements of a row that lie together in shared memory: 128 bytes, which is what the swizzle is made for."""


@gluon.jit
def item_of(turn):
    """Return this program's item of a turn. Every second turn deals the other way round: rows grow ever shorter."""
    grid = gl.num_programs(0)
    program = gl.program_id(0)
    return turn * grid + gl.where(turn % 2 == 0, program, grid - 1 - program)


@gluon.jit
def live_blocks(
    query_start,  # int32 [S + 1]
    num_seqs,
    BLOCK_Q: gl.constexpr,
    MIN_Q: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Return the range of query blocks, numbered as in `prefill_attention`, outside which there is nothing to do.

    A captured step has room for many more sequences than it computes: passing over them would take longer than a chunk.
    """
    lanes: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])  # every warp finds it for itself
    lo = 1 << 30
    hi = 0
    for start in range(0, num_seqs, 128):
        s = start + gl.arange(0, 128, lanes)
        begin = gl.load(query_start + s, mask=s < num_seqs, other=0)
        end = gl.load(query_start + s + 1, mask=s < num_seqs, other=0)
        first = begin // BLOCK_Q + s
        is_live = (end - begin >= MIN_Q) & (s < num_seqs)
        lo = gl.minimum(lo, gl.min(gl.where(is_live, first, 1 << 30), 0))
        hi = gl.maximum(hi, gl.max(gl.where(is_live, first + (end - begin + BLOCK_Q - 1) // BLOCK_Q, 0), 0))
    return gl.minimum(lo, hi), hi


@gluon.jit
def locate(
    item,
    query_start,  # int32 [S + 1]
    seq_lens,  # int32 [S]
    num_seqs,
    last_block,
    Hk: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    MIN_Q: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Return an item's KV head, sequence, query block, tokens before the chunk and in all, and last token (exclusive).

    Blocks are dealt from the last, the longest rows first. The last token is 0 where there is nothing to do.
    """
    lanes: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    head = item % Hk
    index = last_block - 1 - item // Hk
    found = 0
    for start in range(0, num_seqs, 128):
        s = start + gl.arange(0, 128, lanes)
        begin = gl.load(query_start + s, mask=s < num_seqs, other=0)
        found += gl.sum(((begin // BLOCK_Q + s <= index) & (s < num_seqs)).to(gl.int32), 0)
    seq = found - 1
    first = gl.load(query_start + seq)
    q_len = gl.load(query_start + seq + 1) - first
    block = index - (first // BLOCK_Q + seq)
    num_tokens = gl.load(seq_lens + seq)
    context = num_tokens - q_len
    hi = gl.minimum(context + (block + 1) * BLOCK_Q, num_tokens)
    is_idle = (block * BLOCK_Q >= q_len) | (q_len < MIN_Q)
    return head, seq, block, context, num_tokens, gl.where(is_idle, 0, hi)


@gluon.jit
def copy_tile(
    rows,  # descriptor of [token rows, Hk * D], blocks [SPAN, PANEL]
    table,  # int32 [max_blocks], the sequence's row of the block table
    column,  # of the KV head
    start,  # first token of the tile
    last_page,  # lookups are clamped to it
    rows_per_block,
    offset,  # 0 for keys, from a key's row to its value's for values
    full,  # barrier
    pieces,  # the buffer, as [stages * panels * parts, SPAN, PANEL]
    stage,
    D: gl.constexpr,
    PAGE: gl.constexpr,
    SPAN: gl.constexpr,
):
    """Start the copy of one K or V tile: as many pieces as it has pages and panels."""
    parts: gl.constexpr = TILE_TOKENS // SPAN
    panels: gl.constexpr = D // PANEL
    mbarrier.expect(full, TILE_TOKENS * D * 2)
    for part in gl.static_range(parts):
        token = start + part * SPAN
        page = gl.load(table + gl.minimum(token // PAGE, last_page))
        row = page * rows_per_block + token % PAGE + offset
        for panel in gl.static_range(panels):
            piece = pieces.index((stage * panels + panel) * parts + part)
            tma.async_copy_global_to_shared(rows, [row, column + panel * PANEL], full, piece)


@gluon.jit
def copy_tiles(
    rows,
    block_tables,  # int32 [S, max_blocks]
    query_start,
    seq_lens,
    k_pieces,
    v_pieces,
    k_full,  # barriers [stages]
    k_empty,
    v_full,
    v_empty,
    rows_per_block,
    value_rows,
    table_stride,
    num_seqs,
    Hk: gl.constexpr,
    D: gl.constexpr,
    PAGE: gl.constexpr,
    SPAN: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    MIN_Q: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The copying warp: K and V of every tile of every item, as soon as a buffer is empty."""
    t = 0
    first_block, last_block = live_blocks(query_start, num_seqs, BLOCK_Q, MIN_Q, 1)
    num_items = (last_block - first_block) * Hk
    for turn in range(gl.cdiv(num_items, gl.num_programs(0))):
        item = item_of(turn)
        if item < num_items:
            head, seq, _block, _context, num_tokens, hi = locate(
                item, query_start, seq_lens, num_seqs, last_block, Hk, BLOCK_Q, MIN_Q, 1
            )
            table = block_tables + seq.to(gl.int64) * table_stride
            last_page = (num_tokens - 1) // PAGE
            for start in range(0, hi, TILE_TOKENS):
                stage = t % STAGES
                was_odd = ((t // STAGES) & 1) ^ 1  # the phase that ended when the buffer was last emptied
                mbarrier.wait(k_empty.index(stage), was_odd)
                copy_tile(
                    rows, table, head * D, start, last_page, rows_per_block, 0, k_full.index(stage), k_pieces, stage,
                    D, PAGE, SPAN,
                )  # fmt: skip
                mbarrier.wait(v_empty.index(stage), was_odd)
                copy_tile(
                    rows, table, head * D, start, last_page, rows_per_block, value_rows, v_full.index(stage), v_pieces,
                    stage, D, PAGE, SPAN,
                )  # fmt: skip
                t += 1
