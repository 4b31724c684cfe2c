"""Every op of the CPU backend against the oracle, over odd sizes, strided inputs and garbage-filled caches."""

import random

import pytest
import torch

from kernels import cpu_torch, reference

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""A few units in the last place of values up to about 4."""
DTYPES = list(TOLERANCE)
SENTINEL = -77.0


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(actual, expected):
    assert actual.dtype == expected.dtype
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 384), (3, 64), (7, 100), (33, 17)])
def test_norms_equal_reference(dtype, rows, width):
    x, residual, weight = (randn(rows, width, dtype=dtype, seed=s) for s in (1, 2, 3))
    weight = weight[0]
    assert_near(cpu_torch.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    for actual, expected in zip(
        cpu_torch.fused_add_rms_norm(x, residual.clone(), weight, 1e-6),
        reference.fused_add_rms_norm(x, residual.clone(), weight, 1e-6),
        strict=True,
    ):
        assert_near(actual, expected)


def test_norm_of_zeros_is_zero():
    assert cpu_torch.rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6).equal(torch.zeros(2, 8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (2, 112), (31, 5)])
def test_silu_and_mul_equals_reference_and_keeps_its_input(dtype, rows, width):
    x = randn(rows, 2 * width, dtype=dtype)
    before = x.clone()
    assert_near(cpu_torch.silu_and_mul(x), reference.silu_and_mul(x))
    assert x.equal(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "head_dim"), [(1, 6, 2, 64), (5, 3, 1, 24), (9, 4, 4, 2)])
def test_rotary_rotates_slices_of_a_fused_projection_and_nothing_else(dtype, tokens, heads, kv_heads, head_dim):
    fused = randn(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    expected = fused.clone()
    cos_sin = randn(50, head_dim, seed=4)
    positions = torch.tensor([(7 * t) % 50 for t in range(tokens)])
    for backend, tensor in ((cpu_torch, fused), (reference, expected)):
        backend.rotary(tensor[:, :heads], tensor[:, heads : heads + kv_heads], positions, cos_sin)
    assert_near(fused, expected)


def arena_layer(num_blocks, block_size, kv_heads, head_dim, dtype, *, fill):
    """The middle layer of a three-layer arena: strided by whole blocks, at an offset."""
    return torch.full((num_blocks, 3, 2, block_size, kv_heads, head_dim), fill, dtype=dtype)[:, 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", [[], [5], [-1], [-1, 30, 0, -1, 17, 31], [3, 2, 1]])
def test_write_kv_touches_its_slots_only(dtype, slots):
    fused = randn(len(slots), 6, 8, dtype=dtype)
    caches = [arena_layer(4, 8, 2, 8, dtype, fill=SENTINEL) for _ in range(2)]
    for backend, cache in zip((cpu_torch, reference), caches, strict=True):
        backend.write_kv(fused[:, 2:4], fused[:, 4:], cache, torch.tensor(slots, dtype=torch.int64))
        assert int((cache != SENTINEL).any(-1).any(-1).sum()) == 2 * sum(slot >= 0 for slot in slots)
    assert caches[0].equal(caches[1])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize("copies", [[], [(3, 0)], [(1, 4), (1, 2), (3, 0)]])
def test_copy_blocks_copies_every_bit_and_leaves_the_others(dtype, copies):
    arena = torch.randint(0, 256, (5, 3, 2, 8, 1, 32), dtype=torch.uint8).view(dtype)  # not-a-numbers among them
    before, expected = arena.clone(), arena.clone()
    sources, destinations = torch.tensor(copies, dtype=torch.int64).view(-1, 2).unbind(1)
    cpu_torch.copy_blocks(arena, sources, destinations)
    reference.copy_blocks(expected, sources, destinations)
    assert arena.view(torch.uint8).equal(expected.view(torch.uint8))
    origin = dict.fromkeys(range(5)) | {destination: source for source, destination in copies}
    for block, source in origin.items():
        held = before[block if source is None else source]
        assert arena[block].view(torch.uint8).equal(held.view(torch.uint8))


def attention_case(runs, *, block_size, heads, kv_heads, head_dim, dtype, seed=0):
    """Inputs for sequences of (query_len, seq_len): scrambled tables, finite garbage wherever nothing was written."""
    source = random.Random(seed)
    widths = [-(-length // block_size) for _, length in runs]
    ids = list(range(sum(widths) + 3))
    source.shuffle(ids)
    cache = arena_layer(len(ids), block_size, kv_heads, head_dim, dtype, fill=1e4)
    tables = torch.empty(len(runs), max(widths) + 2, dtype=torch.int32)
    for row, ((_, length), width) in enumerate(zip(runs, widths, strict=True)):
        blocks = [ids.pop() for _ in range(width)]
        tables[row] = blocks[0]
        tables[row, :width] = torch.tensor(blocks)
        for position in range(length):
            block, offset = blocks[position // block_size], position % block_size
            cache[block, :, offset] = randn(2, kv_heads, head_dim, dtype=dtype, seed=source.randrange(1 << 30))
    starts = torch.tensor([0, *(q for q, _ in runs)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    query = randn(int(starts[-1]), heads + 2, head_dim, dtype=dtype, seed=seed + 1)[:, :heads]
    lengths = torch.tensor([length for _, length in runs], dtype=torch.int32)
    limits = {"max_query_len": max(q for q, _ in runs), "max_seq_len": max(length for _, length in runs)}
    return (query, cache, tables, starts, lengths), {"scale": head_dim**-0.5, **limits}


RUNS = {
    "one row": [(1, 1)],
    "one long row": [(1, 37)],
    "decode, similar lengths": [(1, 17), (1, 30), (1, 32), (1, 33)],
    "decode, lengths far apart": [(1, 3), (1, 150), (1, 16), (1, 1), (1, 40), (1, 9)],
    "whole prompts": [(5, 5), (16, 16), (33, 33)],
    "later chunks": [(16, 32), (3, 35), (16, 100)],
    "decode and chunks": [(1, 20), (1, 64), (16, 16), (7, 55)],
    "a one-token chunk behind a long one": [(1, 20), (9, 9), (1, 50)],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("runs", RUNS.values(), ids=list(RUNS))
@pytest.mark.parametrize(
    "shape",
    [
        {"block_size": 16, "heads": 6, "kv_heads": 2, "head_dim": 32},
        {"block_size": 8, "heads": 3, "kv_heads": 1, "head_dim": 20},
        {"block_size": 16, "heads": 2, "kv_heads": 2, "head_dim": 16},
    ],
    ids=["grouped", "multi-query", "multi-head"],
)
def test_paged_attention_equals_reference(dtype, runs, shape):
    args, limits = attention_case(runs, dtype=dtype, **shape)
    out = cpu_torch.paged_attention(*args, **limits)
    assert out.is_contiguous()
    assert_near(out, reference.paged_attention(*args, **limits))


def test_a_decode_row_does_not_see_what_pads_it():
    runs = [(1, 17), (1, 30)]
    shape = {"block_size": 16, "heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": torch.float32}
    (query, cache, tables, starts, lengths), limits = attention_case(runs, **shape)
    before = cpu_torch.paged_attention(query, cache, tables, starts, lengths, **limits)
    cache[tables[0, 1], :, 1:] = -3e4
    cache[tables[1, 1], :, 14:] = 3e4
    after = cpu_torch.paged_attention(query, cache, tables, starts, lengths, **limits)
    assert after.equal(before)


def test_paged_attention_refuses_a_cache_that_is_not_block_major():
    (query, cache, *rest), limits = attention_case(
        [(1, 4)], block_size=4, heads=2, kv_heads=2, head_dim=4, dtype=torch.float32
    )
    with pytest.raises(ValueError, match="block-major"):
        cpu_torch.paged_attention(query, cache.transpose(2, 3).contiguous().transpose(2, 3), *rest, **limits)
