"""The fp8 KV cache as the reference defines it."""

import pytest
import torch

from kernels.reference import paged_attention, write_kv
from kernels.reference.fp8_kv import is_fp8, to_fp8

ENCODINGS = {torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0}


@pytest.mark.parametrize(("encoding", "largest"), ENCODINGS.items())
def test_values_keep_a_sixteenth_within_the_window_and_saturate_beyond(encoding, largest):
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 20
    stored = to_fp8(x, encoding).float()
    within = x.abs() >= 2**-6
    assert bool(((stored - x).abs() <= x.abs() / 16)[within].all())
    assert bool(((stored - x).abs() <= 2**-10)[~within].all())
    assert to_fp8(torch.tensor([1e9, -1e9, largest]), encoding).tolist() == [largest, -largest, largest]
    assert bool(to_fp8(torch.tensor([float("nan")]), encoding).float().isnan())


def test_only_e4m3_counts_as_fp8():
    assert [is_fp8(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.int8)] == [True, True, False]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_attention_over_an_fp8_cache_is_near_that_over_the_exact_one(encoding):
    key, value, query = torch.randn(3, 50, 2, 16, generator=torch.Generator().manual_seed(1))
    caches = [torch.zeros(4, 2, 16, 2, 16, dtype=dtype) for dtype in (torch.float32, encoding)]
    tables, starts, lengths = torch.arange(4, dtype=torch.int32)[None], torch.tensor([0, 50]), torch.tensor([50])
    outs = []
    for cache in caches:
        write_kv(key, value, cache, torch.arange(50))
        outs.append(
            paged_attention(query, cache, tables, starts, lengths, scale=0.25, max_query_len=50, max_seq_len=50)
        )
    assert float((outs[1] - outs[0]).norm() / outs[0].norm()) < 0.04
