"""The samplers: what they may draw, how often, and that they draw what the sampler of the CPU draws."""

from __future__ import annotations

import sys

import pytest
import torch

from kernels import triton as ops
from loadtest.gpu import oracles
from shared.engine.noise import gumbel_noise, noise_keys, token_steps
from shared.engine.truncated_draw import Cuts, draw_truncated

VOCABULARY = 2500


def _keys(rows: int) -> torch.Tensor:
    return on_device(noise_keys(list(range(rows)), [0] * rows, [5] * rows))


def on_device(keys: torch.Tensor) -> torch.Tensor:
    return keys.to(torch.get_default_device())


def draw(logits: torch.Tensor, *, temperature: float = 1.0, keys: torch.Tensor | None = None, **filters: float):
    rows = logits.shape[0]
    named = {}
    if filters:
        named = {
            "top_k": torch.full((rows,), int(filters.get("top_k", 0)), dtype=torch.int32),
            "top_p": torch.full((rows,), filters.get("top_p", 1.0)),
            "min_p": torch.full((rows,), filters.get("min_p", 0.0)),
        }
    return ops.sample(
        logits, temperature=torch.full((rows,), temperature), keys=_keys(rows) if keys is None else keys, **named,
    )  # fmt: skip


def test_greedy_takes_the_first_of_the_largest_and_reports_its_raw_logprob():
    logits = torch.randn(2, VOCABULARY).bfloat16()
    logits[0, [700, 2300]] = 9.0
    tokens, logprobs = draw(logits, temperature=0.0)
    assert tokens.tolist() == [700, int(logits[1].argmax())]
    expected = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 1},
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.3},
        {"top_k": 20, "top_p": 0.6, "min_p": 0.05},
        {"top_p": 1e-6},
    ],
)
def test_filters_keep_exactly_the_right_set(filters):
    """With many seeds over a few likely tokens, the drawn set is the kept set."""
    logits = torch.full((1, 40), -2.0)
    logits[0, :8] = torch.tensor([2.0, 1.9, 1.7, 1.4, 1.2, 0.9, 0.8, 0.5])
    top_k, top_p, min_p = filters.get("top_k", 0), filters.get("top_p", 1.0), filters.get("min_p", 0.0)
    kept = oracles.kept_tokens(logits[0], 1.3, top_k, top_p, min_p)
    tokens, _ = draw(logits.repeat(24, 1), temperature=1.3, **filters)
    drawn = set(tokens.tolist())
    allowed = set(kept.nonzero()[:, 0].tolist())
    assert drawn <= allowed
    assert len(allowed) > 10 or drawn == allowed


def test_draws_follow_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    tokens, _ = draw(logits.repeat(200, 1))
    share = torch.bincount(tokens, minlength=4) / 200
    assert (share - logits[0].softmax(-1)).abs().max() < 0.08


def test_a_row_draws_the_same_token_wherever_it_stands_in_the_batch():
    logits = torch.randn(3, VOCABULARY)
    together, _ = draw(logits, top_k=50)
    alone, _ = draw(logits[2:], keys=_keys(3)[2:], top_k=50)
    assert together[2] == alone[0]


def test_forbidden_tokens_are_never_drawn_even_below_top_k():
    logits = torch.full((8, 64), float("-inf"))
    logits[:, 17], logits[:, 40] = 0.0, 0.1
    tokens, _ = draw(logits, top_k=10, top_p=0.9999)
    assert set(tokens.tolist()) <= {17, 40}


def test_penalties_move_the_greedy_choice():
    logits = torch.zeros(3, 50)
    logits[:, 3], logits[:, 4] = 2.0, 1.5
    counts, seen = torch.zeros(3, 50, dtype=torch.int32), torch.zeros(3, 50, dtype=torch.uint8)
    counts[0, 3], counts[1, 3], seen[2, 3] = 2, 1, 1
    penalties = ops.Penalties(
        counts, seen, repetition=torch.tensor([1.0, 1.0, 2.0]), presence=torch.tensor([0.0, 0.6, 0.0]),
        frequency=torch.tensor([0.3, 0.0, 0.0]),
    )  # fmt: skip
    zeros = torch.zeros(3)
    tokens, _ = ops.sample(logits, temperature=zeros, keys=zeros.long(), penalties=penalties)
    assert tokens.tolist() == [4, 4, 4]
    undisturbed, _ = draw(logits, temperature=0.0)
    assert undisturbed.tolist() == [3, 3, 3]


def drawn_whole(logits: torch.Tensor, temperature: torch.Tensor, keys: torch.Tensor) -> list[int]:
    tokens = torch.full((logits.shape[0],), -1)
    ops.draw(logits, temperature, keys, tokens)
    return tokens.tolist()


@pytest.mark.parametrize("vocabulary", [40, 2500, 20000])
def test_a_draw_takes_the_token_that_the_cpu_takes(vocabulary):
    logits, keys = torch.randn(6, vocabulary) * 2, on_device(noise_keys(list(range(6)), [0, 1] * 3, [100] * 6))
    temperature = torch.tensor([0.0, 0.5, 1.0, 1.0, 1.7, 0.9])
    noise = gumbel_noise(keys, token_steps(torch.arange(vocabulary)))
    scores = torch.where(temperature[:, None] > 0, logits / temperature.clamp(min=1e-6)[:, None] + noise, logits)
    assert drawn_whole(logits, temperature, keys) == scores.argmax(-1).tolist()


@pytest.mark.parametrize("pivot_block", [1024, 512])
def test_a_cut_draw_takes_the_token_that_the_cpu_takes(monkeypatch, pivot_block):
    """With as many values at a time as some target takes."""
    monkeypatch.setattr(sys.modules["kernels.triton.sample"], "_pivot_block", lambda target: pivot_block)
    logits, keys = torch.randn(12, VOCABULARY) * 2, on_device(noise_keys(list(range(12)), [0] * 12, [7] * 12))
    tokens, _ = draw(logits, temperature=0.8, keys=keys, top_k=60, top_p=0.9, min_p=0.01)
    rows = torch.ones(12)
    cuts = Cuts(top_k=(rows * 60).long(), top_p=rows.double() * 0.9, min_p=rows * 0.01)
    assert tokens.tolist() == draw_truncated(logits / 0.8, keys, cuts).tolist()


def test_a_draw_prefers_the_first_of_equals_and_never_a_forbidden_token():
    logits = torch.zeros(1, 20000)
    logits[0, [9000, 17000]] = 4.0
    assert drawn_whole(logits, torch.zeros(1), torch.zeros(1, dtype=torch.int64)) == [9000]
    logits = torch.full((30, 9000), float("-inf"))
    logits[:, 8500] = logits[:, 3] = 0.0
    assert set(drawn_whole(logits, torch.ones(30), _keys(30))) == {3, 8500}


def test_pending_tokens_are_taken_from_the_last_step():
    token_ids = torch.arange(300) + 1000
    sources = torch.full((300,), -1, dtype=torch.int32)
    sources[[0, 299]] = torch.tensor([2, 0], dtype=torch.int32)
    ops.fill_pending(token_ids, sources, torch.tensor([7, 8, 9]))
    expected = torch.arange(300) + 1000
    expected[0], expected[299] = 9, 7
    assert token_ids.tolist() == expected.tolist()
