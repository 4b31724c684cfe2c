"""The search over beams, on tables of log-probabilities in the place of a model."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from services.decode.beams import BeamSearch
from shared.engine.sampling_params import SamplingParams
from shared.engine.step import TokenLogprobs

END = 0
VOCAB = 4


def table(seed: int):
    """Log-probabilities of the next token after any tokens."""

    def after(tokens: tuple[int, ...]) -> list[float]:
        rng = random.Random(f"{seed}{tokens}")
        weights = [rng.random() + 0.05 for _ in range(VOCAB)]
        return [math.log(weight / sum(weights)) for weight in weights]

    return after


def likeliest(logprobs: list[float], count: int) -> TokenLogprobs:
    ranked = sorted(range(len(logprobs)), key=lambda token: -logprobs[token])[:count]
    return TokenLogprobs(logprobs[ranked[0]], ranked, [logprobs[token] for token in ranked])


def search(after, width: int, length: int, *, penalty: float = 1.0, num_logprobs: int | None = None):
    params = SamplingParams(max_tokens=length, beam_width=width, length_penalty=penalty, num_logprobs=num_logprobs)
    found = BeamSearch(params, frozenset({END}))
    while not found.is_over:
        found.advance([likeliest(after(beam.token_ids), 2 * width) for beam in found.beams])
    return found.best()


def every_output(after, length: int):
    """All complete outputs with their sums: those that end, and those of full length."""
    for size in range(1, length + 1):
        for tokens in itertools.product(range(VOCAB), repeat=size):
            if END in tokens[:-1] or (size < length and tokens[-1] != END):
                continue
            yield tokens, sum(after(tokens[:i])[token] for i, token in enumerate(tokens))


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_wide_enough_search_finds_the_best_of_all_outputs(seed, penalty):
    after, length = table(seed), 3
    best = max(every_output(after, length), key=lambda output: output[1] / len(output[0]) ** penalty)
    beam = search(after, 64, length, penalty=penalty)[0]
    assert beam.token_ids == best[0]
    assert beam.total == pytest.approx(best[1])


def test_one_beam_is_greedy():
    after = table(1)
    tokens: tuple[int, ...] = ()
    while len(tokens) < 6 and (not tokens or tokens[-1] != END):
        logprobs = after(tokens)
        tokens += (max(range(VOCAB), key=logprobs.__getitem__),)
    # An output that ends early is a candidate too, so greedy's may be beaten but not missed.
    (beam,) = search(after, 1, 6, penalty=0.0)
    assert beam.total >= sum(after(tokens[:i])[token] for i, token in enumerate(tokens)) - 1e-9


def test_beams_come_best_first_with_the_token_that_ended_them():
    beams = search(table(2), 3, 5, num_logprobs=2)
    assert [beam.score(1.0) for beam in beams] == sorted((beam.score(1.0) for beam in beams), reverse=True)
    for beam in beams:
        assert beam.stop_token_id == (END if beam.token_ids[-1] == END else -1)
        assert sum(entry.logprob for entry in beam.logprobs) == pytest.approx(beam.total)
        assert all(len(entry.top_token_ids) == 2 for entry in beam.logprobs)


def test_equal_beams_come_in_one_order():
    params = SamplingParams(max_tokens=2, beam_width=2)
    found = BeamSearch(params, frozenset())
    found.advance([TokenLogprobs(-1.0, [3, 1, 2], [-1.0, -1.0, -1.0])])
    assert [beam.token_ids for beam in found.beams] == [(3,), (1,)]
