"""Writes a step's keys and values into their slots of the paged cache."""
# mypy: allow-untyped-calls, disable-error-code="no-untyped-def, untyped-decorator, misc"

import torch
import triton
import triton.language as tl

from kernels.triton.narrow import narrow
from kernels.triton.target import largest_stored


@triton.jit
def write_kv_kernel(
    key,  # [T, Hk * D]
    value,  # [T, Hk * D]
    cache,  # [num_blocks, 2, PAGE, Hk * D]
    slots,  # int64 [T]
    key_stride,
    value_stride,
    block_stride,
    value_offset,
    row_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Grid (token, chunk of a row)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    to = cache + slot // PAGE * block_stride + slot % PAGE * row_stride + i
    k = tl.load(key + token * key_stride + i, mask=i < WIDTH, other=0.0)
    v = tl.load(value + token * value_stride + i, mask=i < WIDTH, other=0.0)
    tl.store(to, narrow(k, cache.dtype.element_ty, LARGEST), mask=i < WIDTH)
    tl.store(to + value_offset, narrow(v, cache.dtype.element_ty, LARGEST), mask=i < WIDTH)


def write_kv(key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Copy each token's key and value to its slot.

    Args:
        key: `[T, Hk, D]`, heads contiguous.
        value: `[T, Hk, D]`, heads contiguous.
        kv_cache: `[num_blocks, 2, block_size, Hk, D]`, one layer's view of the arena; modified. A narrower dtype
            (fp8) rounds to nearest and saturates.
        slot_mapping: int64 `[T]`, `block_id * block_size + offset`, distinct; negative slots are skipped.
    """
    num_tokens, num_heads, head_dim = key.shape
    if num_tokens == 0:
        return
    width = num_heads * head_dim
    block = min(1024, triton.next_power_of_2(width))
    write_kv_kernel[(num_tokens, triton.cdiv(width, block))](
        key, value, kv_cache, slot_mapping, key.stride(0), value.stride(0),
        kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2),
        WIDTH=width, BLOCK=block, PAGE=kv_cache.shape[2], LARGEST=largest_stored(kv_cache.dtype),
        num_warps=4,
    )  # fmt: skip
