"""Causal grouped-query attention over the paged cache, one sequence and one head at a time."""

from __future__ import annotations

import torch

from kernels.reference.quantized_kv import dequantize_rows, is_quantized


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
    """Attention of any mix of decode rows and prefill chunks; keys and values of the step are already in the cache.

    Query token `i` of sequence `s` sits at position `seq_lens[s] - query_len[s] + i` and sees every cached token up to
    and including its own.

    Args:
        query: `[T, Hq, D]`, last dimension contiguous; `Hq` is a multiple of `Hk`.
        kv_cache: `[num_blocks, 2, block_size, Hk, D]`, one layer's view of the arena (any block stride). Slots past
            `seq_lens` in a sequence's last block must hold finite numbers: backends mask scores, not values. Of int8 it
            is quantized, see `quantized_kv`; fp8 is read as the values it holds.
        block_tables: int32 `[S, max_blocks]`; entries past a sequence's last block must still name some block.
        query_start: int32 `[S + 1]`; tokens of sequence `s` are `[query_start[s], query_start[s + 1])`.
        seq_lens: int32 `[S]`, cached tokens including this step's.
        scale: Factor on the scores before the softmax.
        max_query_len: Longest query run of the batch.
        max_seq_len: Upper bound of `seq_lens`.

    Returns:
        New `[T, Hq, D]`, contiguous, dtype of `query`.
    """
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    num_heads, num_kv_heads, block_size = query.shape[1], kv_cache.shape[3], kv_cache.shape[2]
    widen = dequantize_rows if is_quantized(kv_cache) else torch.Tensor.float
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    for s, length in enumerate(lengths):
        blocks = block_tables[s, : -(-length // block_size)].long()
        keys, values = (widen(kv_cache[blocks, part].flatten(0, 1)[:length]) for part in (0, 1))  # [length, Hk, D]
        first_position = length - (starts[s + 1] - starts[s])
        for i, t in enumerate(range(starts[s], starts[s + 1])):
            visible = first_position + i + 1
            for head in range(num_heads):
                kv_head = head * num_kv_heads // num_heads
                scores = keys[:visible, kv_head] @ query[t, head].float() * scale
                out[t, head] = (torch.softmax(scores, dim=0) @ values[:visible, kv_head]).to(query.dtype)
    return out
