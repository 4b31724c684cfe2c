"""No caller's numbers reach a step that they would break: a batch is other people's, too."""

import math

import pytest

from shared.engine.admission import check_token_ids
from shared.engine.sampling_limits import check_sampling
from shared.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from shared.errors import InvalidRequest


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 0},
        {"min_tokens": -1},
        {"temperature": -0.5},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": -0.1},
        {"top_p": 1.5},
        {"top_p": math.nan},
        {"top_k": -1},
        {"min_p": 2.0},
        {"presence_penalty": math.nan},
        {"frequency_penalty": math.inf},
        {"repetition_penalty": -1.0},
        {"repetition_penalty": math.nan},
        {"num_logprobs": -1},
        {"num_logprobs": MAX_LOGPROBS + 1},
        {"logit_bias": {5: math.nan}},
    ],
    ids=str,
)
def test_what_a_step_could_not_use_is_refused(fields):
    with pytest.raises(InvalidRequest):
        check_sampling(SamplingParams(**{"max_tokens": 4, **fields}))


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.0}, {"num_logprobs": 0}, {"logit_bias": {-5: -100.0}}])
def test_what_it_can_use_passes(fields):
    check_sampling(SamplingParams(**{"max_tokens": 4, **fields}))


@pytest.mark.parametrize("token_ids", [[], [-1, 2], [1, 10], [2**31 - 1]])
def test_tokens_outside_the_vocabulary_never_reach_a_kernel(token_ids):
    with pytest.raises(InvalidRequest):
        check_token_ids(token_ids, 10)
