"""Both attention kernels against float64, at the borders of pages, tiles and splits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kernels.reference import paged_attention as reference_attention
from kernels.triton import paged_attention
from kernels.triton.decode_attention import choose_num_splits
from loadtest.gpu import oracles
from tests.kernels.triton.check_plugin import INTERPRETED

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
ENCODINGS = [torch.float8_e4m3fn, torch.float8_e4m3fnuz] if INTERPRETED else [torch.float8_e4m3fn]
"""The second is gfx942's."""


def error_of(case: oracles.AttentionCase) -> float:
    out = paged_attention(
        case.query, case.kv_cache, case.block_tables, case.query_start, case.seq_lens,
        scale=case.scale, max_query_len=case.max_query_len, max_seq_len=case.max_seq_len,
    )  # fmt: skip
    return oracles.relative_error(out, oracles.attention(case))


@pytest.mark.parametrize(
    ("dtype", "page", "heads", "group", "head_dim"),
    [
        (torch.float32, 16, 2, 3, 64),
        (torch.float16, 32, 1, 4, 96),
        (torch.bfloat16, 16, 1, 4, 128),
        (torch.bfloat16, 128, 1, 8, 64),
        (torch.bfloat16, 64, 1, 1, 256),
    ],
)
def test_decode_is_right_at_page_tile_and_split_borders(dtype, page, heads, group, head_dim):
    lens = [1, page - 1, page, page + 1, 127, 129, 256, 513]
    case = oracles.attention_case(
        [1] * 8, lens, num_kv_heads=heads, group=group, head_dim=head_dim, page=page, dtype=dtype
    )
    assert error_of(case) < TOLERANCE[dtype]


@pytest.mark.parametrize(("query_lens", "seq_lens"), [([2, 1, 3], [2, 40, 260]), ([8, 5, 1], [513, 5, 257])])
def test_decode_of_several_query_tokens_is_causal_across_splits(query_lens, seq_lens):
    case = oracles.attention_case(
        query_lens, seq_lens, num_kv_heads=1, group=3, head_dim=64, page=16, dtype=torch.bfloat16
    )
    assert error_of(case) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(
    ("dtype", "page", "group", "head_dim"),
    [
        (torch.float32, 16, 2, 64),
        (torch.float16, 32, 3, 64),
        (torch.bfloat16, 16, 4, 128),
        (torch.bfloat16, 128, 1, 96),
        (torch.bfloat16, 64, 8, 256),
    ],
)
def test_a_mixed_batch_of_decodes_and_chunks_is_right(dtype, page, group, head_dim):
    query_lens, seq_lens = [1, 37, 9, 1, 70], [150, 37, 139, 1, 200]
    case = oracles.attention_case(
        query_lens, seq_lens, num_kv_heads=1, group=group, head_dim=head_dim, page=page, dtype=dtype
    )
    assert error_of(case) < TOLERANCE[dtype]


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_tiles_for_long_sequences_are_right_too(head_dim):
    case = oracles.attention_case(
        [1, 37, 150], [150, 37, 290], num_kv_heads=1, group=4, head_dim=head_dim, page=16, dtype=torch.bfloat16
    )
    assert error_of(dataclasses.replace(case, max_seq_len=9000)) < TOLERANCE[torch.bfloat16]


def test_chunks_of_one_length_skip_the_decode_kernel_and_are_right():
    case = oracles.attention_case(
        [33, 33], [33, 161], num_kv_heads=2, group=4, head_dim=64, page=16, dtype=torch.bfloat16
    )
    assert error_of(case) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("query_lens", "seq_lens", "page", "head_dim"),
    [
        ([1, 20], [70, 50], 16, 64),
        ([1, 1, 1, 1], [15, 17, 128, 700], 16, 128),
        ([1, 37, 130], [129, 290, 130], 64, 96),
    ],
)
def test_fp8_cache_is_read_as_the_values_it_holds(encoding, query_lens, seq_lens, page, head_dim):
    case = oracles.attention_case(
        query_lens, seq_lens, num_kv_heads=1, group=4, head_dim=head_dim, page=page, dtype=torch.bfloat16,
        cache_dtype=encoding,
    )  # fmt: skip
    assert error_of(case) < TOLERANCE[torch.bfloat16]


def test_fp8_attention_agrees_with_the_reference_op():
    case = oracles.attention_case(
        [1, 9], [40, 30], num_kv_heads=2, group=2, head_dim=64, page=16, dtype=torch.bfloat16,
        cache_dtype=torch.float8_e4m3fn, poison=False,
    )  # fmt: skip
    found, expected = (
        op(
            case.query, case.kv_cache, case.block_tables, case.query_start, case.seq_lens,
            scale=case.scale, max_query_len=case.max_query_len, max_seq_len=case.max_seq_len,
        )
        for op in (paged_attention, reference_attention)
    )  # fmt: skip
    assert oracles.relative_error(found, expected) < TOLERANCE[torch.bfloat16]


def test_padding_rows_of_length_zero_give_zeros():
    case = oracles.attention_case(
        [1, 1, 1], [40, 0, 0], num_kv_heads=2, group=2, head_dim=64, page=16, dtype=torch.float32
    )
    assert error_of(case) < TOLERANCE[torch.float32]


def test_splits_fill_the_device_and_vanish_when_the_batch_does():
    assert choose_num_splits(8, 4096, 64, 264) >= 16
    assert choose_num_splits(512, 1024, 64, 264) == 1
    assert choose_num_splits(8, 64, 64, 264) == 1
    assert choose_num_splits(512, 8192, 64, 264) >= 4
