"""Every way to cut attention into programs that a measurement compares gives the same attention."""

from __future__ import annotations

import pytest
import torch

from kernels.triton.decode_attention import DecodePlan, decode_attention
from kernels.triton.prefill_attention import PrefillTile, prefill_attention
from loadtest.gpu import oracles

TOLERANCE = 6e-3


@pytest.mark.parametrize(
    "tile",
    [
        PrefillTile(64, 64, 4, 3),
        PrefillTile(64, 32, 4, 3),
        PrefillTile(128, 64, 8, 3),
    ],
)
def test_every_way_to_cut_a_prefill_gives_the_same_attention(tile):
    case = oracles.attention_case(
        [70, 70, 70], [70, 203, 128], num_kv_heads=2, group=4, head_dim=64, page=64, dtype=torch.bfloat16
    )
    out = torch.empty(case.query.shape, dtype=case.query.dtype)
    prefill_attention(
        case.query, case.kv_cache, case.block_tables, case.query_start, case.seq_lens, out,
        scale=case.scale, min_query_len=2, max_seq_len=case.max_seq_len, tile=tile,
    )  # fmt: skip
    assert oracles.relative_error(out, oracles.attention(case)) < TOLERANCE


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
