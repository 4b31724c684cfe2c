"""Every way to cut attention into programs that a measurement compares gives the same attention."""

from __future__ import annotations

import pytest
import torch

from kernels.triton.decode_attention import DecodePlan, decode_attention
from kernels.triton.prefill_attention import PrefillTile, prefill_attention
from kernels.triton.prefill_tma_attention import TmaTile, prefill_tma_attention
from loadtest.gpu import oracles

TOLERANCE = 6e-3


@pytest.mark.parametrize(
    "tile",
    [
        PrefillTile(64, 64, 4, 3, masked_stages=2),
        PrefillTile(64, 32, 4, 3, mask_all=True),
        PrefillTile(128, 64, 8, 3, is_even=True),
        TmaTile(rows=64, tokens=64),
        TmaTile(rows=128, tokens=32),
    ],
)
def test_every_way_to_cut_a_prefill_gives_the_same_attention(tile):
    case = oracles.attention_case(
        [70, 70, 70], [70, 203, 128], num_kv_heads=2, group=4, head_dim=64, page=64, dtype=torch.bfloat16
    )
    out = torch.empty(case.query.shape, dtype=case.query.dtype)
    inputs = (case.query, case.kv_cache, case.block_tables, case.query_start, case.seq_lens, out)
    if isinstance(tile, TmaTile):
        prefill_tma_attention(*inputs, scale=case.scale, min_query_len=2, tile=tile)
    else:
        prefill_attention(*inputs, scale=case.scale, min_query_len=2, max_seq_len=case.max_seq_len, tile=tile)
    assert oracles.relative_error(out, oracles.attention(case)) < TOLERANCE


def test_the_tma_prefill_leaves_short_runs_to_the_decode_kernel():
    case = oracles.attention_case(
        [1, 33], [90, 40], num_kv_heads=1, group=2, head_dim=64, page=32, dtype=torch.bfloat16
    )
    out = torch.full(case.query.shape, 5.0, dtype=case.query.dtype)
    prefill_tma_attention(
        case.query, case.kv_cache, case.block_tables, case.query_start, case.seq_lens, out,
        scale=case.scale, min_query_len=2, tile=TmaTile(tokens=32),
    )  # fmt: skip
    assert bool((out[0] == 5.0).all())
    assert oracles.relative_error(out[1:], oracles.attention(case)[1:]) < TOLERANCE


@pytest.mark.parametrize("plan", [DecodePlan(32, 4, 3, 1), DecodePlan(64, 4, 2, 3)])
def test_every_plan_of_a_decode_gives_the_same_attention(plan):
    case = oracles.attention_case(
        [1, 1, 1], [300, 31, 129], num_kv_heads=2, group=4, head_dim=64, page=16, dtype=torch.bfloat16,
        cache_dtype=torch.float8_e4m3fn,
    )  # fmt: skip
    out = torch.empty(case.query.shape, dtype=case.query.dtype)
    decode_attention(
        case.query, case.kv_cache, case.block_tables, case.query_start, case.seq_lens, out,
        scale=case.scale, max_query_len=1, max_seq_len=300, plan=plan,
    )  # fmt: skip
    assert oracles.relative_error(out, oracles.attention(case)) < TOLERANCE
