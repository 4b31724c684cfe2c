"""What every kernel should have computed, in float64 and the most obvious way; and inputs to compare on.

Inputs poison what a kernel must not use: block tails past a sequence's end, blocks of nobody and other layers hold NaN.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import xxhash


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """One layer's attention inputs, all on one device; the fields are the op's arguments."""

    query: torch.Tensor
    kv_cache: torch.Tensor
    block_tables: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    scale: float
    max_query_len: int
    max_seq_len: int


def attention_case(
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    *,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    page: int,
    dtype: torch.dtype,
    device: str | None = None,
    cache_dtype: torch.dtype | None = None,
    poison: bool = True,
) -> AttentionCase:
    """Return random inputs: scattered blocks in a two-layer arena, queries as a slice of a fused projection.

    `device` None is torch's default device.
    Without `poison` the whole arena is random, which is quicker to make at benchmark sizes.
    """
    needed = [-(-n // page) for n in seq_lens]
    num_blocks = sum(needed) + 3
    shape = (num_blocks, 2, 2, page, num_kv_heads, head_dim)
    arena = torch.randn(shape, device=device, dtype=dtype if not poison else torch.float32)
    if poison:
        arena[:, 0] = float("nan")
    order = torch.randperm(num_blocks, device=device).int()
    tables = torch.zeros((len(needed), max(max(needed), 1) + 1), dtype=torch.int32, device=device)
    free = 0
    for row, (count, length) in enumerate(zip(needed, seq_lens, strict=True)):
        tables[row, :count] = order[free : free + count]
        free += count
        if poison and length % page:
            arena[int(tables[row, count - 1]), 1, :, length % page :] = float("nan")
    if poison:
        arena[order[free:].long()] = float("nan")
    cache = arena.to(cache_dtype or dtype)[:, 1]
    heads = num_kv_heads * group
    fused = torch.randn((sum(query_lens), heads + 2, head_dim), device=device, dtype=torch.float32).to(dtype)
    starts = list(itertools.accumulate(query_lens, initial=0))
    return AttentionCase(
        query=fused[:, :heads],
        kv_cache=cache,
        block_tables=tables,
        query_start=torch.tensor(starts, dtype=torch.int32, device=device),
        seq_lens=torch.tensor(list(seq_lens), dtype=torch.int32, device=device),
        scale=head_dim**-0.5,
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
    )


def attention(case: AttentionCase) -> torch.Tensor:
    """Return `[T, Hq, D]` float64; rows of a sequence of length 0 are zero."""
    num_kv_heads = case.kv_cache.shape[3]
    group = case.query.shape[1] // num_kv_heads
    page = case.kv_cache.shape[2]
    out = torch.zeros(case.query.shape, dtype=torch.float64, device=case.query.device)
    for s, length in enumerate(case.seq_lens.tolist()):
        first, last = case.query_start[s : s + 2].tolist()
        if length == 0 or first == last:
            continue
        blocks = case.kv_cache[case.block_tables[s, : -(-length // page)].long()].to(torch.float32).double()
        keys, values = (blocks[:, i].flatten(0, 1)[:length].repeat_interleave(group, 1) for i in (0, 1))
        scores = torch.einsum("qhd,nhd->hqn", case.query[first:last].double(), keys) * case.scale
        seen = torch.arange(length, device=out.device) <= (
            length - (last - first) + torch.arange(last - first, device=out.device)
        ).unsqueeze(1)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[first:last] = torch.einsum("hqn,nhd->qhd", weights, values)
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return float64 `[T, H]`."""
    wide = x.double()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.double()


def rotated(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Return `x` `[T, heads, D]` rotated, float64."""
    first, second = x.double().chunk(2, -1)
    cos, sin = cos_sin[positions].double().unsqueeze(1).chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def angles(num_positions: int, head_dim: int, device: str | None = None) -> torch.Tensor:
    """Return the fp32 table `[num_positions, head_dim]`, cosines then sines, base 10,000."""
    rates = 10000.0 ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim)
    table = torch.arange(num_positions, device=device, dtype=torch.float64).unsqueeze(1) * rates
    return torch.cat((table.cos(), table.sin()), -1).float()


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """Return float64 `[T, I]`."""
    gate, up = x.double().chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


def checksum(block: torch.Tensor) -> int:
    """Return the xxh3-64 of one uint8 `[block_bytes]` as a signed 64-bit integer."""
    found = xxhash.xxh3_64_intdigest(block.cpu().numpy().data)
    return found - (1 << 64) if found >> 63 else found


def kept_tokens(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Return the bool mask `[V]` of the tokens that top-k, then top-p, then min-p leave of one row."""
    x = logits.double() / temperature
    keep = torch.ones_like(x, dtype=torch.bool)
    if 0 < top_k < x.numel():
        keep &= x >= x.topk(top_k).values[-1]
    if top_p < 1:
        ordered, order = x.masked_fill(~keep, float("-inf")).softmax(-1).sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        smallest = x[order[before < top_p * ordered.sum()]].min()
        keep &= x >= smallest
    if min_p > 0:
        keep &= x >= x.max() + torch.tensor(min_p).log()
    return keep


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of `expected`; NaN anywhere gives NaN, which passes no test."""
    wide = expected.double()
    return float((actual.double() - wide).norm() / wide.norm())
