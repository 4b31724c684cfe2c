"""Counter-based sampling noise: a pure function of (seed, choice, position, token id), equal on every worker.

SplitMix64 (Steele, Lea and Flood 2014), whose n-th output is a bijective scramble of `state + n * GOLDEN`: the state
is a scramble of seed, choice and position, and token `t` gets output `t`. The top 31 bits become Gumbel noise, so that
the argmax of `logit + noise` is a draw from the softmax (Gumbel 1954). 64-bit arithmetic wraps in numpy and torch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_WORD = (1 << 64) - 1


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _scramble(states: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """First output of a SplitMix64 generator per state."""
    z = states + np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_FIRST)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_SECOND)
    return z ^ (z >> np.uint64(31))


def noise_keys(seeds: list[int], choices: list[int], positions: list[int]) -> torch.Tensor:
    """One key per row.

    Args:
        seeds: Of the session; taken modulo 2^64.
        choices: Index of the choice in its session.
        positions: Index in the sequence of the token to be drawn.

    Returns:
        int64 `[R]` on the CPU.
    """
    keys = _scramble(np.array([seed & _WORD for seed in seeds], dtype=np.uint64))
    for counters in (choices, positions):
        keys = _scramble(keys + np.array(counters, dtype=np.uint64))
    return torch.from_numpy(keys.view(np.int64))


def token_steps(token_ids: torch.Tensor) -> torch.Tensor:
    """How far each token's output lies from its row's state: int64, shape of `token_ids`; for `gumbel_noise`."""
    return (token_ids + 1) * _signed(_GOLDEN)


def gumbel_noise(keys: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise in about [-2.9, 22.2].

    Args:
        keys: int64 `[R]`.
        steps: int64 `[M]` or `[R, M]`, from `token_steps`.

    Returns:
        float32 `[R, M]`.
    """
    z = keys[:, None] + steps
    z ^= (z >> 30) & ((1 << 34) - 1)
    z *= _signed(_FIRST)
    z ^= (z >> 27) & ((1 << 37) - 1)
    z *= _signed(_SECOND)
    # The last scramble of SplitMix64 leaves these bits as they are.
    bits = (z >> 33) & ((1 << 31) - 1)
    # Small values are exact, large ones round; hence the exponential is taken where small ones decide who wins.
    uniform = bits.float().add_(0.5).mul_(2.0**-31).clamp_(max=1.0 - 2.0**-24)
    exponential = uniform.neg_().log1p_().neg_()
    return exponential.log_().neg_()
