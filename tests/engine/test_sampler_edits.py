"""Penalties, bias, forbidden tokens and log-probabilities, against slow obvious code."""

import random
from collections import Counter

import pytest
import torch

from shared.engine.logit_edits import edit_logits
from shared.engine.sampler import Sampler
from shared.engine.sampling_params import SamplingParams
from shared.engine.sequence import Sequence

VOCAB = 30
EOS = frozenset({3, 4})
CPU = torch.device("cpu")


def make_sequence(prompt, output=(), **params):
    return Sequence(
        session_id="s",
        token_ids=[*prompt, *output],
        num_prompt_tokens=len(prompt),
        sampling=SamplingParams(max_tokens=99, **({"temperature": 0.0} | params)),
        namespace=b"",
    )


def slowly_edited(row, sequence):
    """The definition, token by token."""
    params = sequence.sampling
    output = Counter(sequence.token_ids[sequence.num_prompt_tokens :])
    edited = []
    for token, value in enumerate(row.tolist()):
        value += params.logit_bias.get(token, 0.0)
        if token in sequence.token_ids:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        if token in output:
            value -= params.presence_penalty + params.frequency_penalty * output[token]
        if sequence.num_output_tokens < params.min_tokens and token in EOS | params.stop_token_ids:
            value = float("-inf")
        edited.append(value)
    return torch.tensor(edited)


def random_sequence(source):
    def maybe(value, off):
        return value if source.random() < 0.5 else off

    return make_sequence(
        [source.randrange(VOCAB) for _ in range(source.randrange(1, 20))],
        [source.randrange(VOCAB) for _ in range(source.randrange(0, 20))],
        presence_penalty=maybe(source.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(source.uniform(-2, 2), 0.0),
        repetition_penalty=maybe(source.uniform(0.5, 2), 1.0),
        logit_bias=maybe({source.randrange(VOCAB): source.uniform(-5, 5) for _ in range(4)}, {}),
        min_tokens=maybe(10, 0),
        stop_token_ids=maybe(frozenset({7, 8}), frozenset()),
    )


@pytest.mark.parametrize("seed", range(8))
def test_edits_of_a_batch_equal_the_slow_definition_row_by_row(seed):
    source = random.Random(seed)
    sequences = [random_sequence(source) for _ in range(9)]
    logits = torch.randn(9, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    expected = torch.stack([slowly_edited(row, s) for row, s in zip(logits, sequences, strict=True)])
    edit_logits(logits, sequences, EOS)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_rows_without_edits_are_not_touched():
    logits = torch.randn(2, VOCAB)
    before = logits.clone()
    edit_logits(logits, [make_sequence([1, 2], [3]), make_sequence([1], min_tokens=0)], EOS)
    assert logits.equal(before)


def test_tokens_beyond_the_vocabulary_cannot_reach_into_the_next_row():
    logits = torch.zeros(2, VOCAB)
    first = make_sequence([1], logit_bias={VOCAB + 1: 9.0, -1: 9.0}, min_tokens=1, stop_token_ids=frozenset({VOCAB}))
    edit_logits(logits, [first, make_sequence([1])], frozenset())
    assert logits.equal(torch.zeros(2, VOCAB))


def test_a_sequence_may_end_once_it_has_min_tokens():
    logits = torch.zeros(2, VOCAB)
    logits[:, 3] = 5.0
    sampler = Sampler(VOCAB, EOS, max_logprobs=20, device=CPU)
    sequences = [make_sequence([1], [2], min_tokens=2), make_sequence([1], [2, 2], min_tokens=2)]
    result = sampler.sample(logits, sequences)
    assert result.token_ids[0] != 3
    assert result.token_ids[1] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_the_raw_logits(dtype):
    logits = (torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    wanted = torch.log_softmax(logits.float(), dim=-1)
    sequences = [
        make_sequence([1], num_logprobs=5, logit_bias={7: 100.0}),
        make_sequence([1]),
        make_sequence([1], num_logprobs=0, temperature=0.7, seed=3),
        make_sequence([1], num_logprobs=99, temperature=2.0, top_k=2, repetition_penalty=3.0),
    ]
    result = Sampler(VOCAB, EOS, max_logprobs=20, device=CPU).sample(logits.clone(), sequences)
    assert result.token_ids[0] == 7
    assert result.logprobs[1] is None
    for row, count in ((0, 5), (2, 0), (3, 20)):
        logprobs = result.logprobs[row]
        expected = wanted[row].topk(count)
        assert logprobs.logprob == pytest.approx(float(wanted[row, result.token_ids[row]]), abs=1e-5)
        assert logprobs.top_token_ids == expected.indices.tolist()
        assert logprobs.top_logprobs == pytest.approx(expected.values.tolist(), abs=1e-5)


def test_a_sequence_that_samples_nothing_is_a_defect():
    sequence = make_sequence([1])
    sequence.sampling = None
    with pytest.raises(AssertionError, match="samples nothing"):
        Sampler(VOCAB, EOS, max_logprobs=20, device=CPU).sample(torch.zeros(1, VOCAB), [sequence])
