"""The oracle itself, against formulas written another way."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels import reference


def test_rms_norm_leaves_rows_of_unit_mean_square():
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)) * 7
    normed = reference.rms_norm(x, torch.ones(48), 0.0)
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(5))
    torch.testing.assert_close(normed / x, (normed / x)[:, :1].expand(5, 48))


def test_fused_add_normalises_the_rounded_sum():
    generator = torch.Generator().manual_seed(1)
    x, residual = (torch.randn(3, 16, generator=generator).bfloat16() for _ in range(2))
    weight = torch.randn(16, generator=generator).bfloat16()
    normed, total = reference.fused_add_rms_norm(x, residual, weight, 1e-5)
    assert total.equal(x + residual)
    assert normed.equal(reference.rms_norm(x + residual, weight, 1e-5))


def test_rotary_multiplies_complex_pairs_by_unit_phases():
    generator = torch.Generator().manual_seed(2)
    q, k = torch.randn(4, 3, 8, generator=generator), torch.randn(4, 1, 8, generator=generator)
    angles = torch.rand(20, 4, generator=generator) * 2 * math.pi
    positions = torch.tensor([19, 0, 7, 7])
    phase = torch.polar(torch.ones(4, 4), angles[positions])[:, None]
    expected = [torch.complex(x[..., :4], x[..., 4:]) * phase for x in (q, k)]
    reference.rotary(q, k, positions, torch.cat((angles.cos(), angles.sin()), dim=-1))
    for rotated, wanted in zip((q, k), expected, strict=True):
        torch.testing.assert_close(rotated, torch.cat((wanted.real, wanted.imag), dim=-1))


def test_silu_and_mul_takes_the_gate_from_the_first_half():
    x = torch.randn(3, 14, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(reference.silu_and_mul(x), F.silu(x[:, :7]) * x[:, 7:])


@pytest.mark.parametrize("query_len", [1, 5, 11])
def test_paged_attention_equals_dense_causal_attention(query_len):
    generator = torch.Generator().manual_seed(4)
    length, num_heads, num_kv_heads, head_dim, block_size = 11, 4, 2, 8, 4
    keys, values = (torch.randn(length, num_kv_heads, head_dim, generator=generator) for _ in range(2))
    query = torch.randn(query_len, num_heads, head_dim, generator=generator)
    cache = torch.full((6, 2, block_size, num_kv_heads, head_dim), float("nan"))
    table = torch.tensor([[5, 0, 3]], dtype=torch.int32)
    slots = torch.tensor([int(table[0, p // block_size]) * block_size + p % block_size for p in range(length)])
    reference.write_kv(keys, values, cache, slots)
    out = reference.paged_attention(
        query,
        cache,
        table,
        torch.tensor([0, query_len], dtype=torch.int32),
        torch.tensor([length], dtype=torch.int32),
        scale=0.3,
        max_query_len=query_len,
        max_seq_len=length,
    )
    full = torch.zeros(num_heads, length, head_dim)
    full[:, length - query_len :] = query.transpose(0, 1)
    dense = F.scaled_dot_product_attention(
        full,
        keys.repeat_interleave(2, dim=1).transpose(0, 1),
        values.repeat_interleave(2, dim=1).transpose(0, 1),
        is_causal=True,
        scale=0.3,
    )
    torch.testing.assert_close(out, dense[:, length - query_len :].transpose(0, 1))
