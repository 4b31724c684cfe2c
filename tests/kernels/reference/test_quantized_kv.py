"""The 8-bit KV cache as the reference defines it."""

import torch

from kernels.reference import paged_attention, quantized_kv, write_kv
from kernels.reference.quantized_kv import dequantize_rows, quantize_rows
from shared.kv_arena import SCALE_BYTES, KvLayout


def test_values_come_back_within_half_a_quantum_and_zeros_stay_zeros():
    rows = torch.randn(5, 3, 40, generator=torch.Generator().manual_seed(0)) * 7
    rows[2] = 0
    stored = quantize_rows(rows)
    assert (stored.dtype, tuple(stored.shape)) == (torch.int8, (5, 3, 44))
    quantum = rows.abs().amax(-1, keepdim=True) / 127
    assert bool(((dequantize_rows(stored) - rows).abs() <= quantum / 2 * 1.0001).all())
    assert not stored[2].any()


def test_attention_over_a_quantized_cache_is_near_that_over_the_exact_one():
    key, value, query = torch.randn(3, 50, 2, 16, generator=torch.Generator().manual_seed(1))
    caches = [torch.zeros(4, 2, 16, 2, 16), torch.zeros(4, 2, 16, 2, 16 + SCALE_BYTES, dtype=torch.int8)]
    tables, starts, lengths = torch.arange(4, dtype=torch.int32)[None], torch.tensor([0, 50]), torch.tensor([50])
    outs = []
    for cache in caches:
        write_kv(key, value, cache, torch.arange(50))
        outs.append(
            paged_attention(query, cache, tables, starts, lengths, scale=0.25, max_query_len=50, max_seq_len=50)
        )
    torch.testing.assert_close(outs[1], outs[0], atol=0.03, rtol=0.03)


def test_the_arena_counts_the_scales():
    layout = KvLayout(num_layers=3, block_size=16, num_kv_heads=2, head_dim=64, dtype="int8")
    assert SCALE_BYTES == quantized_kv.SCALE_BYTES
    assert layout.block_shape == (3, 2, 16, 2, 68)
    assert layout.block_bytes == 3 * 2 * 16 * 2 * 68
