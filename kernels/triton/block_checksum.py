"""xxh3-64 of whole blocks where they lie: on the device, at the rate at which it reads.

The algorithm is XXH3's for long inputs (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md), so that a
block has one checksum wherever it is: in device memory, on the host, on a disk. It takes a block in chunks of 1,024
bytes, each of 16 stripes of 8 words, into 8 accumulators:

    acc[i]     += low(word[i] ^ key) * high(word[i] ^ key)     for each stripe
    acc[i ^ 1] += word[i]
    acc         = (acc ^ acc >> 47 ^ key) * prime              after each chunk

Within a chunk there are sums only, which have no order: `block_sums_kernel` makes them for all chunks at once and is
bound by memory. What remains is a chain of one short step per chunk, over a sixteenth of the bytes: `fold_sums_kernel`
goes along it, a program for each block.
"""
# mypy: allow-untyped-calls, disable-error-code="no-untyped-def, untyped-decorator, misc"

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

CHUNK_BYTES = 1024
MIN_BYTES = 248
"""Shorter inputs have another algorithm; a block is longer."""

_CHUNKS_PER_PROGRAM = 32
_STEPS_AHEAD = 32
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_LAST_STRIPE, _END = len(_SECRET) - 64 - 7, 11
_START = (
    0xC2B2AE3D, 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9,
    0x85EBCA77C2B2AE63, 0x85EBCA77, 0x27D4EB2F165667C5, 0x9E3779B1,
)  # fmt: skip


def checksum_keys() -> list[int]:
    """Return the constants that both kernels read, as 48 signed 64-bit words.

    0..23: keys; stripe `s` takes 8 from `s`, the step after a chunk those from 16. 24: of a block's last stripe. 32: of
    the end. 40: what the accumulators start with.
    """
    keys = [_SECRET[start + 8 * i :][:8] for start, n in ((0, 24), (_LAST_STRIPE, 8), (_END, 8)) for i in range(n)]
    words = [*(int.from_bytes(key, "little") for key in keys), *_START]
    return [word - (1 << 64) if word >> 63 else word for word in words]


@triton.jit
def _product(word, key):
    mixed = word ^ key
    return (mixed & 0xFFFFFFFF) * (mixed >> 32)


@triton.jit
def block_sums_kernel(
    arena,  # int64 [num_blocks, NUM_WORDS]
    block_ids,  # int32 or int64 [n]
    keys,  # int64 [48]
    sums,  # int64 [n, NUM_CHUNKS, 8]
    NUM_WORDS: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Grid (block, run of CHUNKS chunks)."""
    LAST_STRIPES: tl.constexpr = (NUM_WORDS * 8 - 1) // 64 - 16 * (NUM_CHUNKS - 1)
    n = tl.program_id(0).to(tl.int64)
    block = tl.load(block_ids + n).to(tl.int64)
    chunk = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)[:, None]
    lane = tl.arange(0, 8)[None, :]
    words = arena + block * NUM_WORDS
    at = words + chunk * 128 + lane
    products = tl.zeros([CHUNKS, 8], tl.uint64)
    plain = tl.zeros([CHUNKS, 8], tl.uint64)
    for stripe in tl.static_range(16):
        # The last chunk has fewer stripes, and then that of the block's last 64 bytes, wherever those begin.
        is_there = (chunk < NUM_CHUNKS) if stripe < LAST_STRIPES else (chunk < NUM_CHUNKS - 1)
        word = tl.load(at + stripe * 8, mask=is_there, other=0).to(tl.uint64, bitcast=True)
        key = tl.load(keys + stripe + lane).to(tl.uint64, bitcast=True)
        products += tl.where(is_there, _product(word, key), tl.zeros_like(word))
        plain += word
    last = tl.load(words + NUM_WORDS - 8 + lane).to(tl.uint64, bitcast=True)
    last_product = _product(last, tl.load(keys + 24 + lane).to(tl.uint64, bitcast=True))
    is_last = chunk == NUM_CHUNKS - 1
    products += tl.where(is_last, last_product, tl.zeros_like(products))
    plain += tl.where(is_last, last, tl.zeros_like(plain))
    even, odd = tl.split(tl.reshape(plain, [CHUNKS, 4, 2]))
    total = products + tl.reshape(tl.join(odd, even), [CHUNKS, 8])
    tl.store(sums + (n * NUM_CHUNKS + chunk) * 8 + lane, total.to(tl.int64, bitcast=True), mask=chunk < NUM_CHUNKS)


@triton.jit
def _after_chunk(accumulators, keys):
    mixed = (accumulators ^ (accumulators >> 47)) ^ keys
    return mixed * 0x9E3779B1


@triton.jit
def fold_sums_kernel(
    sums,  # int64 [n, NUM_CHUNKS, 8]
    keys,  # int64 [48]
    out,  # int64 [n]
    NUM_WORDS: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Grid (block); loads AHEAD steps' sums at once, because only the steps wait for each other."""
    n = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, 8)
    at = sums + n * NUM_CHUNKS * 8 + lane
    after = tl.load(keys + 16 + lane).to(tl.uint64, bitcast=True)
    accumulators = tl.load(keys + 40 + lane).to(tl.uint64, bitcast=True)
    WHOLE: tl.constexpr = NUM_CHUNKS - 1
    for first in range(0, WHOLE // AHEAD * AHEAD, AHEAD):
        for step in tl.static_range(AHEAD):
            accumulators += tl.load(at + (first + step) * 8).to(tl.uint64, bitcast=True)
            accumulators = _after_chunk(accumulators, after)
    for step in range(WHOLE // AHEAD * AHEAD, WHOLE):
        accumulators += tl.load(at + step * 8).to(tl.uint64, bitcast=True)
        accumulators = _after_chunk(accumulators, after)
    accumulators += tl.load(at + WHOLE * 8).to(tl.uint64, bitcast=True)
    mixed = accumulators ^ tl.load(keys + 32 + lane).to(tl.uint64, bitcast=True)
    even, odd = tl.split(tl.reshape(mixed, [4, 2]))
    folded = (even * odd) ^ tl.umulhi(even, odd)
    LENGTH: tl.constexpr = (NUM_WORDS * 8 * 0x9E3779B185EBCA87) % (1 << 64)
    total = tl.sum(folded, 0) + LENGTH
    total = (total ^ (total >> 37)) * 0x165667919E3779F9
    tl.store(out + n, (total ^ (total >> 32)).to(tl.int64, bitcast=True))


def _geometry(block_bytes: int) -> dict[str, int]:
    """Return what is compiled into both kernels; the last chunk may be short and is never empty.

    Raises:
        ValueError: The algorithm for such blocks is another one.
    """
    if block_bytes < MIN_BYTES or block_bytes % 8:
        raise ValueError(f"a block of {block_bytes} bytes: it must have {MIN_BYTES} or more, and a multiple of 8")
    return {"NUM_WORDS": block_bytes // 8, "NUM_CHUNKS": triton.cdiv(block_bytes, CHUNK_BYTES)}


class CompiledChecksum(NamedTuple):
    """Both kernels for blocks of one size, to be launched where there is no Triton; all their parameters are pointers.

    Attributes:
        sums: Grid (block, programs_per_block).
        fold: Grid (block); after it.
        sums_bytes_per_block: Of memory that the first writes and the second reads.
    """

    sums: Any
    fold: Any
    programs_per_block: int
    sums_bytes_per_block: int


def compile_checksum(block_bytes: int) -> CompiledChecksum:
    """Compile for the current device and for blocks of `block_bytes`, named by int32 ids.

    Raises:
        ValueError: See `_geometry`.
    """
    geometry, words = _geometry(block_bytes), torch.int64
    num_chunks = geometry["NUM_CHUNKS"]
    sums = block_sums_kernel.warmup(
        words, torch.int32, words, words, **geometry, CHUNKS=_CHUNKS_PER_PROGRAM, num_warps=4, grid=(1, 1)
    )
    fold = fold_sums_kernel.warmup(words, words, words, **geometry, AHEAD=_STEPS_AHEAD, num_warps=1, grid=(1,))
    return CompiledChecksum(sums, fold, triton.cdiv(num_chunks, _CHUNKS_PER_PROGRAM), num_chunks * 64)


def block_checksum(arena_u8: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    """Return the xxh3-64 of each named block.

    Args:
        arena_u8: uint8 `[num_blocks, block_bytes]` contiguous, `block_bytes` a multiple of 8 and at least MIN_BYTES.
        block_ids: int32 or int64 `[n]`, on the arena's device.

    Returns:
        int64 `[n]`: the same 64 bits.

    Raises:
        ValueError: See `_geometry`.
    """
    out = torch.empty(block_ids.shape, dtype=torch.int64, device=arena_u8.device)
    if block_ids.numel() == 0:
        return out
    n, geometry = block_ids.shape[0], _geometry(arena_u8.shape[1])
    num_chunks = geometry["NUM_CHUNKS"]
    keys = torch.tensor(checksum_keys(), dtype=torch.int64, device=arena_u8.device)
    sums = torch.empty((n, num_chunks, 8), dtype=torch.int64, device=arena_u8.device)
    words = arena_u8.view(torch.int64)
    grid = (n, triton.cdiv(num_chunks, _CHUNKS_PER_PROGRAM))
    block_sums_kernel[grid](words, block_ids, keys, sums, **geometry, CHUNKS=_CHUNKS_PER_PROGRAM, num_warps=4)
    fold_sums_kernel[(n,)](sums, keys, out, **geometry, AHEAD=_STEPS_AHEAD, num_warps=1)
    return out
