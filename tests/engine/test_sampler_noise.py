"""The noise is SplitMix64, is Gumbel, and depends on its four counters."""

import math

import pytest
import torch

from shared.engine.noise import gumbel_noise, noise_keys, token_steps

WORD = (1 << 64) - 1


def splitmix64(state, count):
    """Outputs 1..count of the published generator, in Python's integers."""
    outputs = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & WORD
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
        outputs.append(z ^ (z >> 31))
    return outputs


def test_splitmix64_gives_its_published_first_outputs():
    assert splitmix64(0, 2) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_keys_chain_the_scrambles_of_seed_choice_and_position():
    def key(seed, choice, position):
        for counter in (choice, position):
            seed = (splitmix64(seed & WORD, 1)[0] + counter) & WORD
        return splitmix64(seed, 1)[0]

    rows = [(0, 0, 0), (-1, 3, 17), (1 << 63, 1, 4095), ((1 << 64) + 5, 0, 1)]
    keys = noise_keys(*(list(column) for column in zip(*rows, strict=True)))
    assert [k & WORD for k in keys.tolist()] == [key(*row) for row in rows]


@pytest.mark.parametrize("key", [0, 12345, -(1 << 63), (1 << 63) - 1])
def test_noise_of_token_t_is_output_t_as_a_gumbel_variate(key):
    noise = gumbel_noise(torch.tensor([key]), token_steps(torch.arange(500)))[0]
    uniforms = [((output >> 33) + 0.5) / 2**31 for output in splitmix64(key & WORD, 500)]
    expected = [-math.log(-math.log1p(-u)) for u in uniforms]
    torch.testing.assert_close(noise.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_noise_does_not_depend_on_which_tokens_are_asked_for():
    keys = noise_keys([1, 2], [0, 0], [9, 9])
    everything = gumbel_noise(keys, token_steps(torch.arange(100)))
    some = torch.tensor([[5, 99, 0], [7, 7, 98]])
    assert gumbel_noise(keys, token_steps(some)).equal(everything.gather(1, some))


def test_noise_has_the_moments_of_gumbel_and_is_finite():
    keys = noise_keys(list(range(100)), [0] * 100, list(range(100)))
    noise = gumbel_noise(keys, token_steps(torch.arange(10000))).double()
    assert noise.isfinite().all()
    assert abs(float(noise.mean()) - 0.57722) < 0.005
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.014  # four standard errors of a million draws


def test_rows_that_differ_in_one_counter_share_nothing():
    keys = noise_keys([1, 2, 1, 1], [0, 0, 1, 0], [0, 0, 0, 1])
    noise = gumbel_noise(keys, token_steps(torch.arange(20000))).double()
    correlations = torch.corrcoef(noise) - torch.eye(4)
    assert float(correlations.abs().max()) < 0.03
