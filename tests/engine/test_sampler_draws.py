"""What the sampler may draw and how often, alone and in any batch."""

import random

import pytest
import torch

from shared.engine import truncated_draw
from shared.engine.sampler import Sampler
from shared.engine.sampling_params import SamplingParams
from shared.engine.sequence import Sequence

VOCAB = 40
CPU = torch.device("cpu")
CHI_SQUARE_SIGMAS = 4.5
"""A right sampler fails about once in 100,000 runs; the seeds are fixed, so it either passes always or never."""


def make_sampler(vocab_size=VOCAB, **options):
    return Sampler(vocab_size, frozenset({0}), **({"max_logprobs": 20, "device": CPU} | options))


def make_sequence(*, position=5, choice=0, **params):
    return Sequence(
        session_id="s",
        token_ids=[1] * position,
        num_prompt_tokens=position,
        sampling=SamplingParams(max_tokens=9, **params),
        namespace=b"",
        choice=choice,
    )


def logits_of(seed, rows=1, vocab_size=VOCAB, scale=2.0):
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def tokens(logits, sequences, **options):
    return make_sampler(logits.shape[1], **options).sample(logits.clone(), sequences).token_ids


def truncated_distribution(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """One row's probabilities by sorting and looping, in float64."""
    probabilities = torch.softmax(logits.double() / temperature, dim=-1).tolist()
    order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    kept = order[:top_k] if top_k else order
    total = sum(probabilities[token] for token in kept)
    nucleus, mass = [], 0.0
    for token in kept:
        if mass >= top_p * total:
            break
        nucleus.append(token)
        mass += probabilities[token]
    nucleus = [token for token in nucleus if probabilities[token] >= min_p * probabilities[order[0]]]
    total = sum(probabilities[token] for token in nucleus)
    return {token: probabilities[token] / total for token in nucleus}


CUTS = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.6},
    {"top_p": 1e-9},
    {"top_p": 0.999},
    {"min_p": 0.15},
    {"min_p": 1.0},
    {"top_k": 12, "top_p": 0.8, "min_p": 0.05, "temperature": 1.3},
]


@pytest.mark.parametrize("num_candidates", [4, 256], ids=["sorted whole", "likeliest first"])
@pytest.mark.parametrize("params", CUTS, ids=str)
def test_draws_follow_the_truncated_softmax(monkeypatch, params, num_candidates):
    monkeypatch.setattr(truncated_draw, "NUM_CANDIDATES", num_candidates)
    draws = 4000
    logits = logits_of(3)
    expected = truncated_distribution(logits[0], **params)
    sequences = [make_sequence(seed=seed, **params) for seed in range(draws)]
    counts = torch.bincount(torch.tensor(tokens(logits.expand(draws, -1), sequences)), minlength=VOCAB).tolist()
    assert {token for token, count in enumerate(counts) if count} <= set(expected)
    likely = {token: p for token, p in expected.items() if p * draws >= 5}
    rest = draws * (1 - sum(likely.values()))
    cells = [(counts[token], p * draws) for token, p in likely.items()]
    cells += [(draws - sum(count for count, _ in cells), rest)] if rest >= 5 else []
    statistic = sum((count - wanted) ** 2 / wanted for count, wanted in cells)
    freedom = max(1, len(cells) - 1)
    assert statistic < freedom + CHI_SQUARE_SIGMAS * (2 * freedom) ** 0.5


def test_greedy_takes_the_first_of_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [9.0, 0.0, 0.0, 0.0]])
    assert tokens(logits, [make_sequence(temperature=0.0)] * 2) == [1, 0]


def test_tokens_that_tie_with_the_last_one_kept_are_kept():
    logits = torch.tensor([[5.0, 4.0, 4.0, 4.0, 0.0]])
    drawn = {tokens(logits, [make_sequence(seed=seed, top_k=2)])[0] for seed in range(60)}
    assert drawn == {0, 1, 2, 3}


def test_a_temperature_near_zero_is_greedy():
    logits = logits_of(4, rows=8)
    sequences = [make_sequence(seed=row, temperature=1e-30) for row in range(8)]
    assert tokens(logits, sequences) == logits.argmax(-1).tolist()


def mixed_sequences(count):
    source = random.Random(0)
    options = [{}, {"temperature": 0.0}, {"top_p": 0.7}, {"top_k": 3}, {"top_p": 0.95, "min_p": 0.02}, {"top_k": 300}]
    return [
        make_sequence(
            seed=source.randrange(1 << 64),
            position=source.randrange(1, 50),
            choice=source.randrange(3),
            num_logprobs=source.choice([None, 2]),
            **({"temperature": source.uniform(0.3, 2.0)} | source.choice(options)),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("vocab_size", [VOCAB, 1000])
def test_a_row_draws_the_same_alone_and_in_any_batch(vocab_size):
    sequences = mixed_sequences(40)
    logits = logits_of(5, rows=40, vocab_size=vocab_size)
    together = tokens(logits, sequences)
    assert together == [tokens(logits[row : row + 1], [sequences[row]])[0] for row in range(40)]
    order = random.Random(1).sample(range(40), 40)
    shuffled = tokens(logits[order], [sequences[row] for row in order])
    assert shuffled == [together[row] for row in order]


def test_looking_at_fewer_candidates_first_never_changes_a_draw(monkeypatch):
    sequences = mixed_sequences(60)
    logits = logits_of(6, rows=60, vocab_size=700, scale=0.7)
    drawn = tokens(logits, sequences)
    for num_candidates in (1, 2, 30, 700):
        monkeypatch.setattr(truncated_draw, "NUM_CANDIDATES", num_candidates)
        assert tokens(logits, sequences) == drawn


def test_seed_choice_and_position_each_change_the_draws():
    logits = logits_of(7, vocab_size=400, scale=0.1)
    variants = [{"seed": 1}, {"seed": 2}, {"seed": 1, "choice": 1}, {"seed": 1, "position": 6}]
    assert len({tokens(logits, [make_sequence(**variant)])[0] for variant in variants}) == 4


def test_bias_of_minus_infinity_is_never_drawn():
    logits = torch.zeros(1, 3)
    bias = {0: float("-inf"), 2: float("-inf")}
    assert {tokens(logits, [make_sequence(seed=s, logit_bias=bias, top_p=0.9)])[0] for s in range(20)} == {1}
