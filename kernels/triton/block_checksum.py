"""A 64-bit checksum of a block's bytes, computed where the block lies.

With a block as little-endian words `w[0 .. n)` and all arithmetic modulo 2^64:

    t = w[i] + (i + 1) * 0x9E3779B97F4A7C15
    t = (t ^ t >> 32) * 0xD6E8FEB86659FD93
    checksum = sum over i of (t ^ t >> 29)

The mix of a word is a bijection that differs from position to position, so one changed word always changes the sum, and
two exchanged words change it but for one chance in 2^64. A sum has no order: programs add their parts atomically.
"""
# mypy: allow-untyped-calls, disable-error-code="no-untyped-def, untyped-decorator, misc"

import torch
import triton
import triton.language as tl

_WORDS_PER_STEP = 1024
_STEPS = 8


@triton.jit(do_not_specialize=["num_words"])
def block_checksum_kernel(
    arena,  # int64 [num_blocks, num_words]
    block_ids,  # int32 or int64 [n]
    out,  # int64 [n], zeroed
    num_words,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Grid (block, run of BLOCK * STEPS words)."""
    POSITION: tl.constexpr = 0x9E3779B97F4A7C15
    MIX: tl.constexpr = 0xD6E8FEB86659FD93
    BLOCK_KEY: tl.constexpr = (BLOCK * 0x9E3779B97F4A7C15) % (1 << 64)
    n = tl.program_id(0).to(tl.int64)
    block = tl.load(block_ids + n).to(tl.int64)
    total = tl.zeros([BLOCK], tl.uint64)
    first = tl.program_id(1) * STEPS * BLOCK + tl.arange(0, BLOCK)
    key = (first + 1).to(tl.uint64) * POSITION
    for step in tl.static_range(STEPS):
        i = first + step * BLOCK
        word = tl.load(arena + block * num_words + i, mask=i < num_words, other=0).to(tl.uint64, bitcast=True)
        mixed = word + key
        key += BLOCK_KEY
        mixed = (mixed ^ (mixed >> 32)) * MIX
        mixed = mixed ^ (mixed >> 29)
        total += tl.where(i < num_words, mixed, tl.zeros_like(mixed))
    tl.atomic_add(out + n, tl.sum(total, 0).to(tl.int64, bitcast=True))


def block_checksum(arena_u8: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    """Return the checksum of each named block.

    Args:
        arena_u8: uint8 `[num_blocks, block_bytes]` contiguous, `block_bytes` a multiple of 8.
        block_ids: int32 or int64 `[n]`, on the arena's device.

    Returns:
        int64 `[n]`.
    """
    out = torch.zeros(block_ids.shape, dtype=torch.int64, device=arena_u8.device)
    if block_ids.numel() == 0:
        return out
    words = arena_u8.view(torch.int64)
    grid = (block_ids.shape[0], triton.cdiv(words.shape[1], _WORDS_PER_STEP * _STEPS))
    block_checksum_kernel[grid](words, block_ids, out, words.shape[1], BLOCK=_WORDS_PER_STEP, STEPS=_STEPS, num_warps=4)
    return out
