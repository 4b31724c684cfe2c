"""Invariant mode: equal bits for a token alone, in every batch and after every chunking; and right by float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from kernels.backend import load_backend
from kernels.triton import invariant
from kernels.triton import invariant_attention as attention
from kernels.triton.invariant_linear import invariant_matmul, num_runs_of
from loadtest.gpu import oracles
from loadtest.gpu.random_llama import random_decoder, tiny_llama
from shared.models.decoder import Decoder, ForwardInputs
from tests.kernels.triton.check_plugin import INTERPRETED

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


@pytest.fixture(autouse=True)
def products_in_order(monkeypatch):
    if INTERPRETED:
        from tests.kernels.triton.interpreter import Products

        monkeypatch.setattr(Products, "in_order", True)


@pytest.fixture
def short_runs(monkeypatch):
    """So that short sequences have several."""
    monkeypatch.setattr(attention, "RUN_TOKENS", 64)


def attended(case: oracles.AttentionCase) -> torch.Tensor:
    return invariant.paged_attention(
        case.query, case.kv_cache, case.block_tables, case.query_start, case.seq_lens,
        scale=case.scale, max_query_len=case.max_query_len, max_seq_len=case.max_seq_len,
    )  # fmt: skip


def part(case: oracles.AttentionCase, tokens: Sequence[range], sequences: Sequence[int]) -> oracles.AttentionCase:
    """The step that computes `tokens` of `sequences` (as numbered in the case), a chunk each."""
    starts, lens = case.query_start.tolist(), case.seq_lens.tolist()
    rows, seq_lens, query_start = [], [], [0]
    for chunk, s in zip(tokens, sequences, strict=True):
        rows += [starts[s] + i for i in chunk]
        seq_lens.append(lens[s] - (starts[s + 1] - starts[s]) + chunk.stop)
        query_start.append(len(rows))
    return dataclasses.replace(
        case,
        query=case.query[torch.tensor(rows)],
        block_tables=case.block_tables[torch.tensor(list(sequences))],
        query_start=torch.tensor(query_start, dtype=torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        max_query_len=max(len(chunk) for chunk in tokens),
        max_seq_len=max(seq_lens),
    )


@pytest.mark.parametrize(
    ("dtype", "cache", "page", "group", "head_dim"),
    [
        (torch.float32, None, 16, 3, 32),
        (torch.bfloat16, None, 128, 4, 64),
        (torch.bfloat16, torch.float8_e4m3fn, 16, 2, 32),
    ],
)
def test_attention_of_a_token_has_the_same_bits_in_every_step(short_runs, dtype, cache, page, group, head_dim):
    case = oracles.attention_case(
        [70, 1, 33], [200, 131, 33], num_kv_heads=1, group=group, head_dim=head_dim, page=page, dtype=dtype,
        cache_dtype=cache,
    )  # fmt: skip
    whole = attended(case)
    assert oracles.relative_error(whole, oracles.attention(case)) < TOLERANCE[dtype]
    steps = [
        part(case, [range(70)], [0]),  # alone
        part(case, [range(69, 70), range(1)], [0, 1]),  # two decodes
        part(case, [range(32, 33), range(33, 67)], [2, 0]),  # a decode beside a chunk, in another order
        part(case, [range(62, 65)], [0]),  # several query tokens of a decode step, over the border of a run
    ]
    rows = [range(70), [69, 70], [103, *range(33, 67)], range(62, 65)]
    for step, where in zip(steps, rows, strict=True):
        assert torch.equal(attended(step), whole[torch.tensor(list(where))])


@pytest.mark.parametrize("runs_per_program", [1, 2, 3, 4])
def test_how_many_runs_a_program_takes_costs_no_bit(short_runs, monkeypatch, runs_per_program):
    case = oracles.attention_case(
        [1, 1, 1], [200, 64, 0], num_kv_heads=2, group=2, head_dim=32, page=16, dtype=torch.bfloat16
    )
    expected = oracles.attention(case)
    monkeypatch.setattr(attention, "choose_runs_per_program", lambda *_: runs_per_program)
    found = attended(case)
    assert oracles.relative_error(found, expected) < TOLERANCE[torch.bfloat16]
    monkeypatch.setattr(attention, "choose_runs_per_program", lambda *_: 4)
    assert torch.equal(found, attended(case))


def test_runs_of_few_sequences_are_spread_and_those_of_many_kept_together():
    assert attention.choose_runs_per_program(8, 8, 264) == 1
    assert attention.choose_runs_per_program(512, 8, 264) == 8
    assert attention.choose_runs_per_program(128, 8, 264) == 3


@pytest.mark.parametrize(
    ("dtype", "outputs", "inputs"), [(torch.bfloat16, 40, 1100), (torch.bfloat16, 136, 64), (torch.float32, 8, 520)]
)
def test_a_product_of_a_row_has_the_same_bits_whatever_the_other_rows_are(dtype, outputs, inputs):
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((150, inputs), (outputs, inputs), (outputs,)))
    all_rows = invariant_matmul(x, weight, bias)
    expected = x.double() @ weight.double().T + bias.double()
    assert oracles.relative_error(all_rows, expected) < TOLERANCE[dtype]
    for rows in (slice(0, 1), slice(149, 150), slice(60, 70)):
        for whole in (False, True):
            assert torch.equal(invariant_matmul(x[rows], weight, bias, whole=whole), all_rows[rows])


def test_runs_of_a_product_follow_from_the_weights_shape():
    assert num_runs_of(4096, 4096, 128, 64) == 8
    assert num_runs_of(4096, 14336, 128, 64) == 8
    assert num_runs_of(28672, 4096, 128, 64) == 1
    assert num_runs_of(128, 64, 128, 64) == 1


PROMPTS = [[(5 * i + 7 * s) % 190 for i in range(n)] for s, n in enumerate((41, 9, 23))]


class Steps:
    """A model over a small cache, fed step by step."""

    def __init__(self, model: Decoder, cache_dtype: torch.dtype) -> None:
        config = model.config
        self._model = model
        self._caches = [torch.zeros(12, 2, 16, config.num_kv_heads, config.head_dim).to(cache_dtype)]
        self._tables = torch.arange(12, dtype=torch.int32).view(3, 4)

    def run(self, chunks: list[tuple[int, int, int]]) -> list[torch.Tensor]:
        """Compute tokens `[begin, end)` of each sequence; logits of every token, per chunk."""
        tokens, positions, slots, starts = [], [], [], [0]
        for s, begin, end in chunks:
            tokens += PROMPTS[s][begin:end]
            positions += range(begin, end)
            slots += [int(self._tables[s, p // 16]) * 16 + p % 16 for p in range(begin, end)]
            starts.append(len(tokens))
        hidden = self._model.forward(
            ForwardInputs(
                token_ids=torch.tensor(tokens), positions=torch.tensor(positions), slot_mapping=torch.tensor(slots),
                block_tables=self._tables[torch.tensor([s for s, _, _ in chunks])],
                query_start=torch.tensor(starts, dtype=torch.int32),
                seq_lens=torch.tensor([end for _, _, end in chunks], dtype=torch.int32),
                max_query_len=max(end - begin for _, begin, end in chunks),
                max_seq_len=max(end for _, _, end in chunks),
            ),
            self._caches,
        )  # fmt: skip
        return list(self._model.logits(hidden).split([end - begin for _, begin, end in chunks]))


SCHEDULES: dict[str, list[list[tuple[int, int, int]]]] = {
    "alone and whole": [[(0, 0, 41)], [(1, 0, 9)], [(2, 0, 23)]],
    "all in one step": [[(2, 0, 23), (0, 0, 41), (1, 0, 9)]],
    "chunks beside decodes": [
        [(0, 0, 17), (1, 0, 8)],
        [(0, 17, 39), (1, 8, 9), (2, 0, 5)],
        [(0, 39, 40), (2, 5, 22)],
        [(0, 40, 41), (2, 22, 23)],
    ],
}


def test_logits_of_a_whole_model_have_the_same_bits_under_every_schedule(monkeypatch):
    monkeypatch.setattr(attention, "RUN_TOKENS", 16)
    torch.manual_seed(3)
    model = random_decoder(tiny_llama(), DEVICE, torch.bfloat16, numerics="invariant")
    assert model.backend.numerics == "triton-invariant"
    found = {}
    for name, steps in SCHEDULES.items():
        made = Steps(model, torch.float8_e4m3fn)
        rows: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}
        for step in steps:
            for (s, _, _), logits in zip(step, made.run(step), strict=True):
                rows[s].append(logits)
        found[name] = torch.cat([torch.cat(rows[s]) for s in range(3)])
    first, *others = found.values()
    assert bool(first.isfinite().all())
    assert all(torch.equal(first, other) for other in others)


def test_invariant_mode_is_another_numerics_and_needs_no_other_ops():
    fast, exact = (load_backend("triton", DEVICE, torch.bfloat16, numerics=name) for name in ("fast", "invariant"))
    assert (fast.numerics, exact.numerics) == ("triton", "triton-invariant")
    assert exact.ops is invariant
