"""The continuous-batching workload: 64 requests of token ids, log-normal lengths, all there at once."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """Exactly `output_tokens` are generated, greedily."""

    prompt: list[int]
    output_tokens: int


def draw_requests(vocab_size: int, count: int = 64, seed: int = 0) -> list[TokenRequest]:
    """Prompts of 16 to 512 tokens (median 96), outputs of 8 to 256 (median 64), as chats have them.

    Lengths are the same for every vocabulary.
    """
    rng, ids = random.Random(seed), random.Random(seed + 1)

    def length(low: int, high: int, median: int, sigma: float) -> int:
        return min(high, max(low, round(median * rng.lognormvariate(0, sigma))))

    return [
        TokenRequest([ids.randrange(3, vocab_size) for _ in range(length(16, 512, 96, 0.9))], length(8, 256, 64, 0.9))
        for _ in range(count)
    ]
