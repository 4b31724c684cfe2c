"""The warp-specialised prefill against float64; interpreted, its roles meet in random order."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

from kernels.triton import prefill_hopper_attention as hopper
from loadtest.gpu import oracles
from tests.kernels.triton import gluon_interpreter
from tests.kernels.triton.check_plugin import INTERPRETED

TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 1e-3}

pytestmark = pytest.mark.skipif(
    not INTERPRETED and torch.cuda.get_device_capability() != (9, 0), reason="the GPU is no Hopper"
)
only_interpreted = pytest.mark.skipif(not INTERPRETED, reason="about the interpreter itself")


def attend(case: oracles.AttentionCase, processors: int = 3) -> torch.Tensor:
    out = torch.full(case.query.shape, 5.0, dtype=case.query.dtype)
    with gluon_interpreter.interpreted(processors) if INTERPRETED else contextlib.nullcontext():
        hopper.prefill_hopper_attention(
            case.query, case.kv_cache, case.block_tables, case.query_start, case.seq_lens, out,
            scale=case.scale, min_query_len=2,
        )  # fmt: skip
    return out


@pytest.mark.parametrize(
    ("dtype", "page", "group", "head_dim", "query_lens", "seq_lens"),
    [
        (torch.bfloat16, 16, 4, 128, [70, 33], [70, 300]),
        (torch.bfloat16, 128, 4, 128, [128, 129, 40], [128, 257, 640]),
        (torch.bfloat16, 32, 3, 64, [50, 2, 43], [129, 128, 43]),
        (torch.float16, 64, 8, 64, [17, 16], [385, 16]),
        (torch.float16, 256, 1, 64, [130], [300]),
    ],
)
def test_the_hopper_prefill_is_right_at_page_and_tile_borders(dtype, page, group, head_dim, query_lens, seq_lens):
    case = oracles.attention_case(
        query_lens, seq_lens, num_kv_heads=2, group=group, head_dim=head_dim, page=page, dtype=dtype
    )
    assert oracles.relative_error(attend(case), oracles.attention(case)) < TOLERANCE[dtype]


@pytest.mark.parametrize("query_lens", [[1, 33, 1], [33, 1, 0, 0], [0, 1, 40]])
def test_the_hopper_prefill_leaves_short_runs_to_the_decode_kernel(query_lens):
    case = oracles.attention_case(
        query_lens, [90] * len(query_lens), num_kv_heads=1, group=4, head_dim=64, page=32, dtype=torch.bfloat16
    )
    out, expected = attend(case), oracles.attention(case)
    chunk = query_lens.index(max(query_lens))
    start = sum(query_lens[:chunk])
    mine = slice(start, start + query_lens[chunk])
    assert oracles.relative_error(out[mine], expected[mine]) < TOLERANCE[torch.bfloat16]
    assert bool((out[:start] == 5.0).all())
    assert bool((out[mine.stop :] == 5.0).all())


def test_a_rows_bits_do_not_depend_on_how_the_prompt_was_cut():
    whole = oracles.attention_case([300], [300], num_kv_heads=1, group=4, head_dim=64, page=16, dtype=torch.bfloat16)
    together = attend(whole)
    for first, last in ((0, 37), (37, 170), (170, 300)):
        part = dataclasses.replace(
            whole, query=whole.query[first:last], query_start=torch.tensor([0, last - first], dtype=torch.int32),
            seq_lens=torch.tensor([last], dtype=torch.int32),
        )  # fmt: skip
        assert torch.equal(attend(part), together[first:last])


@only_interpreted
def test_the_interpreter_finds_a_buffer_that_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(gluon_interpreter._HARDWARE["mbarrier"], "wait", lambda barrier, phase, pred=True: None)
    case = oracles.attention_case([40], [600], num_kv_heads=1, group=4, head_dim=64, page=16, dtype=torch.bfloat16)
    assert not oracles.relative_error(attend(case), oracles.attention(case)) < 0.1


@only_interpreted
def test_the_interpreter_finds_a_barrier_that_nobody_completes(monkeypatch):
    monkeypatch.setattr(gluon_interpreter._HARDWARE["mbarrier"], "arrive", lambda barrier, count: None)
    case = oracles.attention_case([40], [600], num_kv_heads=1, group=4, head_dim=64, page=16, dtype=torch.bfloat16)
    with pytest.raises(gluon_interpreter.DeviceHang, match=r"roles \[.*2.*\] wait"):
        attend(case)
