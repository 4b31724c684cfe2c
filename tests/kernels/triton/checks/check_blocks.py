"""Gather, scatter, copy and checksum of whole blocks."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels import triton as ops
from loadtest.gpu import oracles


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_gather_then_scatter_restores_the_blocks_and_leaves_the_others(dtype):
    arena = torch.randn(7, 3, 2, 16, 1, 56).to(dtype)
    before = arena.clone()
    ids = torch.tensor([5, 0, 3])
    staging = torch.empty(3, *arena.shape[1:], dtype=arena.dtype)
    ops.gather_blocks(arena, ids, staging)
    assert torch.equal(staging.view(torch.uint8), before.view(torch.uint8)[ids])
    arena.view(torch.uint8)[ids] = 0
    ops.scatter_blocks(arena, ids, staging)
    assert torch.equal(arena.view(torch.uint8), before.view(torch.uint8))


def test_copies_within_the_arena_equal_the_reference_bit_by_bit():
    arena = torch.randint(0, 256, (6, 3, 2, 16, 1, 56), dtype=torch.uint8).view(torch.bfloat16)
    expected = arena.clone()
    sources, destinations = torch.tensor([(1, 4), (1, 2), (3, 0)]).unbind(1)
    reference.copy_blocks(expected, sources, destinations)
    ops.copy_blocks(arena, sources, destinations)
    assert torch.equal(arena.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("size", [248, 1016, 1024, 1032, 33 * 1024, 34 * 1024 + 64, 66_000, 98_304])
def test_checksum_is_the_xxh3_of_the_block(size):
    arena = torch.randint(0, 256, (4, size), dtype=torch.uint8)
    found = ops.block_checksum(arena, torch.tensor([2, 0, 2], dtype=torch.int32))
    assert found.tolist() == [oracles.checksum(arena[i]) for i in (2, 0, 2)]
