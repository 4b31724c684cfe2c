"""What the engine relies on in sampling parameters: the gateway tells users, this keeps a batch safe from anybody."""

from __future__ import annotations

import math

from shared.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from shared.errors import InvalidRequest


def check_sampling(params: SamplingParams) -> None:
    """Passes what cannot fail in the middle of a step, where it would take the whole batch with it.

    Raises:
        InvalidRequest: A value that is not a finite number or outside its range.
    """
    _check("max_tokens", params.max_tokens, 1, math.inf)
    _check("min_tokens", params.min_tokens, 0, math.inf)
    _check("temperature", params.temperature, 0.0, math.inf)
    _check("top_p", params.top_p, 0.0, 1.0)
    _check("top_k", params.top_k, 0, math.inf)
    _check("min_p", params.min_p, 0.0, 1.0)
    _check("presence_penalty", params.presence_penalty, -math.inf, math.inf)
    _check("frequency_penalty", params.frequency_penalty, -math.inf, math.inf)
    _check("repetition_penalty", params.repetition_penalty, 0.0, math.inf)
    if params.num_logprobs is not None:
        _check("logprobs", params.num_logprobs, 0, MAX_LOGPROBS)
    for bias in params.logit_bias.values():
        _check("logit_bias", bias, -math.inf, math.inf)


def _check(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidRequest(f"{name} is {value}, must be finite and in [{low}, {high}]", param=name)
