"""Copies whole blocks between the arena and a staging buffer, or within the arena: any number of scattered blocks."""
# mypy: allow-untyped-calls, disable-error-code="no-untyped-def, untyped-decorator, misc"

import torch
import triton
import triton.language as tl

_WORDS_PER_STEP = 1024
_STEPS = 4


@triton.jit(do_not_specialize=["num_words"])
def copy_blocks_kernel(
    arena,  # int64 [num_blocks, num_words]
    block_ids,  # int32 or int64 [n]
    staging,  # int64 [n, num_words]
    num_words,
    TO_ARENA: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Grid (block, run of BLOCK * STEPS words)."""
    n = tl.program_id(0).to(tl.int64)
    block = tl.load(block_ids + n).to(tl.int64)
    for step in tl.static_range(STEPS):
        i = (tl.program_id(1) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        in_arena = arena + block * num_words + i
        in_staging = staging + n * num_words + i
        if TO_ARENA:
            tl.store(in_arena, tl.load(in_staging, mask=i < num_words), mask=i < num_words)
        else:
            tl.store(in_staging, tl.load(in_arena, mask=i < num_words), mask=i < num_words)


def _launch(arena: torch.Tensor, block_ids: torch.Tensor, staging: torch.Tensor, *, to_arena: bool) -> None:
    if block_ids.numel() == 0:
        return
    blocks = arena.view(arena.shape[0], -1).view(torch.int64)
    staged = staging.view(staging.shape[0], -1).view(torch.int64)
    grid = (block_ids.shape[0], triton.cdiv(blocks.shape[1], _WORDS_PER_STEP * _STEPS))
    copy_blocks_kernel[grid](
        blocks, block_ids, staged, blocks.shape[1], TO_ARENA=to_arena, BLOCK=_WORDS_PER_STEP, STEPS=_STEPS, num_warps=4
    )


def gather_blocks(arena: torch.Tensor, block_ids: torch.Tensor, staging: torch.Tensor) -> None:
    """Copy `arena[block_ids]` into `staging`.

    Args:
        arena: `[num_blocks, ...]` contiguous, any dtype; the bytes of a block are a multiple of 8.
        block_ids: int32 or int64 `[n]`, contiguous, on the arena's device.
        staging: `[n, ...]` contiguous, of the arena's block shape and dtype; written.
    """
    _launch(arena, block_ids, staging, to_arena=False)


def scatter_blocks(arena: torch.Tensor, block_ids: torch.Tensor, staging: torch.Tensor) -> None:
    """Copy `staging` into `arena[block_ids]`: the inverse of `gather_blocks`, same arguments.

    `block_ids` must be distinct: two writers of one block would race.
    """
    _launch(arena, block_ids, staging, to_arena=True)


def copy_blocks(arena: torch.Tensor, sources: torch.Tensor, destinations: torch.Tensor) -> None:
    """Copy `arena[sources]` to `arena[destinations]` through a staging buffer. See `kernels.reference.copy_blocks`."""
    staging = torch.empty((sources.shape[0], *arena.shape[1:]), dtype=arena.dtype, device=arena.device)
    gather_blocks(arena, sources.contiguous(), staging)
    scatter_blocks(arena, destinations.contiguous(), staging)
