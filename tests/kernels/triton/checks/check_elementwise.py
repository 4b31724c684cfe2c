"""Normalisation, rotary embedding, activation and cache writes against float64; untouched memory stays untouched."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels import triton as ops
from kernels.triton.linear import one_row_linear
from loadtest.gpu import oracles
from tests.kernels.triton.check_plugin import INTERPRETED

TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
DTYPES = list(TOLERANCE)
ENCODINGS = [torch.float8_e4m3fn, torch.float8_e4m3fnuz] if INTERPRETED else [torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 576), (13, 96), (17, 128), (3, 4096)])
def test_rms_norm_matches_over_odd_shapes(dtype, rows, width):
    x, weight = torch.randn(rows, width + 8).to(dtype)[:, :width], torch.randn(width).to(dtype)
    assert oracles.relative_error(ops.rms_norm(x, weight, 1e-5), oracles.rms_norm(x, weight, 1e-5)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_add_rms_norm_returns_the_rounded_sum_and_its_norm(dtype):
    x, residual, weight = torch.randn(5, 300).to(dtype), torch.randn(5, 300).to(dtype), torch.randn(300).to(dtype)
    before = residual.clone()
    normed, summed = ops.fused_add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(summed, x + residual)
    assert torch.equal(residual, before)
    assert oracles.relative_error(normed, oracles.rms_norm(summed, weight, 1e-6)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [40, 1000, 1536])
def test_silu_and_mul_matches(dtype, width):
    x = torch.randn(3, 2 * width).to(dtype) * 4
    assert oracles.relative_error(ops.silu_and_mul(x), oracles.silu_and_mul(x)) < TOLERANCE[dtype]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (8, 1, 96), (4, 4, 128)])
def test_rotary_turns_queries_and_keys_in_place(heads, kv_heads, head_dim):
    fused = torch.randn(6, heads + 2 * kv_heads, head_dim).bfloat16()
    q, k, v = fused.split([heads, kv_heads, kv_heads], 1)
    positions, table = torch.tensor([0, 1, 5, 31, 7, 7]), oracles.angles(32, head_dim)
    expected = [oracles.rotated(x, positions, table) for x in (q, k)]
    untouched = v.clone()
    ops.rotary(q, k, positions, table)
    assert oracles.relative_error(q, expected[0]) < TOLERANCE[torch.bfloat16]
    assert oracles.relative_error(k, expected[1]) < TOLERANCE[torch.bfloat16]
    assert torch.equal(v, untouched)


@pytest.mark.parametrize("page", [16, 128])
@pytest.mark.parametrize("fused", [False, True])
def test_cache_writes_hit_their_slots_and_nothing_else(page, fused):
    arena = torch.full((4, 3, 2, page, 2, 96), -3.0).bfloat16()
    cache, expected = arena[:, 1], arena.clone()
    slots = torch.tensor([5, -1, 3 * page + page - 1, page, 0])
    q, k, v = torch.randn(5, 4, 96).bfloat16(), torch.randn(5, 2, 96).bfloat16(), torch.randn(5, 2, 96).bfloat16()
    positions, table = torch.tensor([9, 2, 0, 4, 11]), oracles.angles(12, 96)
    want_k = oracles.rotated(k, positions, table).bfloat16() if fused else k
    want_q = oracles.rotated(q, positions, table)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // page, 1, 0, slot % page] = want_k[token]
            expected[slot // page, 1, 1, slot % page] = v[token]
    if fused:
        ops.rotary_write_kv(q, k, v, positions, table, cache, slots)
        assert oracles.relative_error(q, want_q) < TOLERANCE[torch.bfloat16]
        torch.testing.assert_close(arena, expected, atol=2e-2, rtol=1e-2)
        assert torch.equal(arena == -3.0, expected == -3.0)
    else:
        ops.write_kv(k, v, cache, slots)
        assert torch.equal(arena, expected)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("fused", [False, True])
def test_an_fp8_cache_gets_the_bytes_that_the_reference_writes(encoding, fused):
    """Past what e4m3 holds too, and below its smallest step."""
    caches = [torch.zeros(3, 2, 16, 2, 64, dtype=torch.uint8).view(encoding) for _ in range(2)]
    k, v = (torch.randn(3, 2, 64) * torch.tensor([1e-3, 1.0, 700.0])[:, None, None] for _ in range(2))
    k, v, q = k.bfloat16(), v.bfloat16(), torch.randn(3, 2, 64).bfloat16()
    slots = torch.tensor([33, -1, 2]) if fused else torch.tensor([33, 17, 2])
    for backend, cache in zip((ops, reference), caches, strict=True):
        if fused:
            backend.rotary_write_kv(
                q.clone(), k.clone(), v, torch.tensor([3, 0, 9]), oracles.angles(16, 64), cache, slots
            )
        else:
            backend.write_kv(k, v, cache, slots)
    assert torch.equal(caches[0].view(torch.uint8), caches[1].view(torch.uint8))
    assert caches[0].float().abs().max() == torch.finfo(encoding).max


@pytest.mark.parametrize("has_bias", [False, True])
def test_one_row_times_a_weight(has_bias):
    x, weight = torch.randn(1, 1024).bfloat16(), torch.randn(24, 1024).bfloat16()
    bias = torch.randn(24).bfloat16() if has_bias else None
    expected = x.double() @ weight.double().T + (bias.double() if bias is not None else 0.0)
    assert oracles.relative_error(one_row_linear(x, weight, bias), expected) < 4e-3
