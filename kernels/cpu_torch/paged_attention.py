"""Causal grouped-query attention over the paged cache by gathering blocks and calling torch's fused attention.

Sequences that decode (one query token) are batched: those of similar length are gathered together, padded to the
longest of them and masked. Prefill chunks go one by one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

PADDING_ALLOWED = 1.5
"""Decode rows share one gather while it reads at most this multiple of the blocks that are really theirs."""


def _gather(kv_cache: torch.Tensor, tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of block tables `[S, M]`, each `[S, Hk, M * block_size, D]` and strided.

    The cache is read as rows of one block's keys or values: `index_select` copies whole rows of a matrix with plain
    copies, three times as fast as the same bytes of a five-dimensional view.
    """
    num_blocks, _, block_size, num_kv_heads, head_dim = kv_cache.shape
    row = block_size * num_kv_heads * head_dim
    rows_per_block, rest = divmod(kv_cache.stride(0), row)
    if rest or kv_cache.stride(1) != row or kv_cache.stride(2) != num_kv_heads * head_dim:
        raise ValueError(f"KV cache of shape {tuple(kv_cache.shape)} has strides {kv_cache.stride()}: not block-major")
    rows = kv_cache.as_strided(((num_blocks - 1) * rows_per_block + 2, row), (row, 1))
    index = tables.reshape(-1) * rows_per_block
    shape = (tables.shape[0], tables.shape[1] * block_size, num_kv_heads, head_dim)
    keys, values = rows.index_select(0, index), rows.index_select(0, index + 1)
    return keys.view(shape).transpose(1, 2), values.view(shape).transpose(1, 2)


def _length_groups(lengths: list[int], block_size: int) -> list[list[int]]:
    """Splits rows so that padding stays bounded: all together, or by the power of two above their block count."""
    blocks = [-(-length // block_size) for length in lengths]
    if max(blocks) * len(blocks) <= PADDING_ALLOWED * sum(blocks):
        return [list(range(len(lengths)))]
    groups: dict[int, list[int]] = {}
    for row, count in enumerate(blocks):
        groups.setdefault(count.bit_length(), []).append(row)
    return list(groups.values())


def _decode_group(
    query: torch.Tensor, kv_cache: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    """Rows of one token: `query` `[S, Hq, D]`, `tables` `[S, blocks]`, `lengths` `[S]` -> `[S, Hq, D]`."""
    num_sequences, num_heads, head_dim = query.shape
    num_kv_heads, block_size = kv_cache.shape[3], kv_cache.shape[2]
    keys, values = _gather(kv_cache, tables[:, : -(-longest // block_size)])
    if num_sequences == 1:
        keys, values, mask = keys[:, :, :longest], values[:, :, :longest], None
    else:
        padding = torch.arange(keys.shape[2], dtype=lengths.dtype) >= lengths[:, None]
        mask = torch.zeros(padding.shape, dtype=query.dtype).masked_fill_(padding, float("-inf"))[:, None, None, :]
    # The query heads of one KV head act as query positions: no repetition of keys, and nothing is causal between them.
    grouped = query.reshape(num_sequences, num_kv_heads, -1, head_dim)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
    return out.reshape(num_sequences, num_heads, head_dim)


def _decode(
    query: torch.Tensor, kv_cache: torch.Tensor, tables: torch.Tensor, seq_lens: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of all rows of one token."""
    lengths = seq_lens.tolist()
    groups = _length_groups(lengths, kv_cache.shape[2])
    if len(groups) == 1:
        return _decode_group(query, kv_cache, tables, seq_lens, max(lengths), scale)
    out = torch.empty(query.shape, dtype=query.dtype)
    for group in groups:
        rows = torch.tensor(group)
        longest = max(lengths[row] for row in group)
        out[rows] = _decode_group(query[rows], kv_cache, tables[rows], seq_lens[rows], longest, scale)
    return out


def _chunk(query: torch.Tensor, kv_cache: torch.Tensor, table: torch.Tensor, length: int, scale: float) -> torch.Tensor:
    """Attention of one prefill chunk: `query` `[q, Hq, D]` are the last `q` of `length` tokens -> `[q, Hq, D]`."""
    query_len = query.shape[0]
    padded_keys, padded_values = _gather(kv_cache, table[None, : -(-length // kv_cache.shape[2])])
    keys, values = padded_keys[:, :, :length], padded_values[:, :, :length]
    first_chunk = query_len == length
    mask = None if first_chunk else torch.ones(query_len, length, dtype=torch.bool).tril_(length - query_len)
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None], keys, values, attn_mask=mask, is_causal=first_chunk, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


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
    """Attention of a mixed batch; specified in `kernels.reference.paged_attention`.

    Sequences of one query token are batched as long as they come before the first longer run, which is how the
    scheduler orders a step; one behind it is merely slower.
    """
    if query.shape[0] == 0:
        return torch.empty(query.shape, dtype=query.dtype)
    if max_query_len == 1:
        return _decode(query, kv_cache, block_tables, seq_lens, scale).contiguous()
    starts = query_start.tolist()
    num_decode = next(s for s in range(len(starts)) if s + 1 == len(starts) or starts[s + 1] - starts[s] != 1)
    out = torch.empty(query.shape, dtype=query.dtype)
    if num_decode:
        rows = slice(0, num_decode)
        out[rows] = _decode(query[rows], kv_cache, block_tables[rows], seq_lens[rows], scale)
    for s, length in enumerate(seq_lens[num_decode:].tolist(), start=num_decode):
        rows = slice(starts[s], starts[s + 1])
        out[rows] = _chunk(query[rows], kv_cache, block_tables[s], length, scale)
    return out
