"""Rotary position embedding (Su et al. 2021, GPT-NeoX's half-split order), alone and fused with the cache write."""
# mypy: allow-untyped-calls, disable-error-code="no-untyped-def, untyped-decorator, misc"

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.triton.narrow import narrow
from kernels.triton.target import current_target, largest_stored, overlapped


@triton.jit(do_not_specialize=["num_tokens"])
def rotary_kernel(
    query,  # [T, Hq, D]
    key,  # [T, Hk, D]
    value,  # [T, Hk, D], read if WRITE_CACHE
    cache,  # [num_blocks, 2, PAGE, Hk, D], written if WRITE_CACHE
    positions,  # int64 [T]
    slots,  # int64 [T], read if WRITE_CACHE
    cos_sin,  # fp32 [max_pos, D]
    num_tokens,
    query_stride,
    key_stride,
    value_stride,
    block_stride,
    value_offset,
    row_stride,
    Hq: tl.constexpr,
    Hk: tl.constexpr,
    D: tl.constexpr,
    HALF_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    WRITE_CACHE: tl.constexpr,
    LARGEST: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (token, head group): groups of query heads first, then of KV heads."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    HALF: tl.constexpr = D // 2
    QUERY_GROUPS: tl.constexpr = (Hq + HEADS - 1) // HEADS
    i = tl.arange(0, HALF_PAD)
    angle = cos_sin + tl.load(positions + token) * D + i
    cos = tl.load(angle, mask=i < HALF, other=0.0)[None, :]
    sin = tl.load(angle + HALF, mask=i < HALF, other=0.0)[None, :]
    if group < QUERY_GROUPS:
        head = group * HEADS + tl.arange(0, HEADS)
        mask = (head < Hq)[:, None] & (i < HALF)[None, :]
        at = query + token * query_stride + head[:, None] * D + i[None, :]
        first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
        tl.store(at, (first * cos - second * sin).to(query.dtype.element_ty), mask=mask)
        tl.store(at + HALF, (second * cos + first * sin).to(query.dtype.element_ty), mask=mask)
    else:
        head = (group - QUERY_GROUPS) * HEADS + tl.arange(0, HEADS)
        mask = (head < Hk)[:, None] & (i < HALF)[None, :]
        at = key + token * key_stride + head[:, None] * D + i[None, :]
        first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
        rotated_first = (first * cos - second * sin).to(key.dtype.element_ty)
        rotated_second = (second * cos + first * sin).to(key.dtype.element_ty)
        if WRITE_CACHE:
            slot = tl.load(slots + token)
            if slot >= 0:
                to = cache + slot // PAGE * block_stride + slot % PAGE * row_stride + head[:, None] * D + i[None, :]
                tl.store(to, narrow(rotated_first, cache.dtype.element_ty, LARGEST), mask=mask)
                tl.store(to + HALF, narrow(rotated_second, cache.dtype.element_ty, LARGEST), mask=mask)
                source = value + token * value_stride + head[:, None] * D + i[None, :]
                v_first = tl.load(source, mask=mask, other=0.0)
                v_second = tl.load(source + HALF, mask=mask, other=0.0)
                tl.store(to + value_offset, narrow(v_first, cache.dtype.element_ty, LARGEST), mask=mask)
                tl.store(to + value_offset + HALF, narrow(v_second, cache.dtype.element_ty, LARGEST), mask=mask)
        else:
            tl.store(at, rotated_first, mask=mask)
            tl.store(at + HALF, rotated_second, mask=mask)


def _heads_per_program(num_tokens: int, num_heads: int) -> int:
    """Few heads per program while there are few tokens, so that a decode step still fills the device.

    No bit depends on it, since products are not contracted with sums (`enable_fp_fusion`), in whichever way.
    """
    most = 16 if num_tokens >= 512 else 4
    return int(min(most, triton.next_power_of_2(num_heads)))


def rotary(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
    """Rotate `q` and `k` in place by the angles of their positions, in fp32.

    Args:
        q: `[T, Hq, D]`, heads contiguous (a slice of a fused projection is fine).
        k: `[T, Hk, D]`, likewise.
        positions: int64 `[T]`.
        cos_sin: fp32 `[max_pos, D]`, cosines in the first half of a row and sines in the second, contiguous.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    if num_tokens == 0:
        return
    num_kv_heads = k.shape[1]
    heads = _heads_per_program(num_tokens, num_kv_heads)
    overlap = current_target().overlaps_launches
    rotary_kernel[(num_tokens, triton.cdiv(num_q_heads, heads) + triton.cdiv(num_kv_heads, heads))](
        q, k, k, k, positions, positions, cos_sin, num_tokens, q.stride(0), k.stride(0), k.stride(0), 0, 0, 0,
        Hq=num_q_heads, Hk=num_kv_heads, D=head_dim, HALF_PAD=triton.next_power_of_2(head_dim // 2), PAGE=1,
        HEADS=heads, WRITE_CACHE=False, LARGEST=0.0, OVERLAP=overlap, num_warps=1 if heads <= 4 else 4,
        enable_fp_fusion=False, **overlapped(overlap),
    )  # fmt: skip


def rotary_write_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Rotate `q` in place and write rotated `k` and `value` into the cache: `rotary` then `write_kv` in one pass.

    `k` itself is left as it was: attention reads the cache, so rotating it in place would be traffic for nobody.

    Args:
        q: `[T, Hq, D]`, modified.
        k: `[T, Hk, D]`.
        value: `[T, Hk, D]`.
        positions: int64 `[T]`.
        cos_sin: fp32 `[max_pos, D]`.
        kv_cache: `[num_blocks, 2, block_size, Hk, D]`, any block stride; fp8 rounds to nearest and saturates.
        slot_mapping: int64 `[T]`, `block_id * block_size + offset`; negative slots are skipped.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    if num_tokens == 0:
        return
    num_kv_heads = k.shape[1]
    heads = _heads_per_program(num_tokens, num_kv_heads)
    overlap = current_target().overlaps_launches
    rotary_kernel[(num_tokens, triton.cdiv(num_q_heads, heads) + triton.cdiv(num_kv_heads, heads))](
        q, k, value, kv_cache, positions, slot_mapping, cos_sin, num_tokens, q.stride(0), k.stride(0),
        value.stride(0), kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2),
        Hq=num_q_heads, Hk=num_kv_heads, D=head_dim, HALF_PAD=triton.next_power_of_2(head_dim // 2),
        PAGE=kv_cache.shape[2], HEADS=heads, WRITE_CACHE=True, LARGEST=largest_stored(kv_cache.dtype), OVERLAP=overlap,
        num_warps=1 if heads <= 4 else 4, enable_fp_fusion=False, **overlapped(overlap),
    )  # fmt: skip
