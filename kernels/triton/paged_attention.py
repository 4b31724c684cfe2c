"""The attention op: sends each sequence of a mixed batch to the kernel made for its number of query tokens."""

import torch

from kernels.triton.decode_attention import MAX_DECODE_QUERY_LEN, decode_attention
from kernels.triton.prefill_attention import prefill_attention
from kernels.triton.prefill_hopper_attention import prefill_hopper_attention, takes

_FEW_TOKENS = 512
"""Up to this length a row's few tiles are over before the roles of the Hopper kernel overlap (measured on an H200)."""


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
    """Causal grouped-query attention over the paged cache, any mix of decode and chunked prefill.

    Query token `i` of sequence `s` sits at position `seq_lens[s] - q_len[s] + i` and sees all cached tokens up to and
    including its own, which must already be written. Nothing is read back from the device: the choice of kernels
    depends only on shapes and the two host integers, so a call can be captured in a CUDA graph.

    Args:
        query: `[T, Hq, D]`, bf16, fp16 or fp32; last dimension contiguous.
        kv_cache: `[num_blocks, 2, block_size, Hk, D]`, one layer's view of the arena (any block stride), in the
            query's dtype or fp8. `block_size` is a power of two.
        block_tables: int32 `[S, max_blocks]`.
        query_start: int32 `[S + 1]`, tokens of sequence `s` are `[query_start[s], query_start[s + 1])`.
        seq_lens: int32 `[S]`, cached tokens including this step's.
        scale: factor on the scores before the softmax.
        max_query_len: longest query run of the batch.
        max_seq_len: upper bound of `seq_lens`.

    Returns:
        `[T, Hq, D]` contiguous, in the query's dtype.
    """
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    num_seqs = seq_lens.shape[0]
    if query.shape[0] == 0:
        return out
    if max_query_len <= MAX_DECODE_QUERY_LEN:
        decode_attention(
            query, kv_cache, block_tables, query_start, seq_lens, out,
            scale=scale, max_query_len=max_query_len, max_seq_len=max_seq_len,
        )  # fmt: skip
        return out
    all_chunks = query.shape[0] == num_seqs * max_query_len
    if not all_chunks:
        decode_attention(
            query, kv_cache, block_tables, query_start, seq_lens, out,
            scale=scale, max_query_len=1, max_seq_len=max_seq_len,
        )  # fmt: skip
    if max_seq_len > _FEW_TOKENS and takes(query, kv_cache):
        prefill_hopper_attention(
            query, kv_cache, block_tables, query_start, seq_lens, out, scale=scale, min_query_len=2
        )  # fmt: skip
        return out
    prefill_attention(
        query, kv_cache, block_tables, query_start, seq_lens, out,
        scale=scale, min_query_len=2, max_seq_len=max_seq_len,
    )  # fmt: skip
    return out
