"""Native sampling chooses what the torch sampler chooses."""

import random
import shutil

import pytest
import torch

from kernels.cpu.build import COMPILERS, supported_isas
from kernels.cpu.library import Library
from kernels.cpu.token_logprobs import token_logprobs
from shared.engine.sampler import Sampler
from shared.engine.sampling_params import SamplingParams
from shared.engine.sequence import Sequence

pytestmark = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=supported_isas(), ids=lambda isa: isa.name)
def library(request):
    return Library(request.param, 2)


def samplers(vocab_size, library):
    options = {"max_logprobs": 5, "device": CPU}
    return Sampler(vocab_size, frozenset({0}), **options), Sampler(
        vocab_size, frozenset({0}), library=library, **options
    )


def random_params(source):
    off = [{}, {}, {"top_k": source.choice([1, 2, 7, 300, 10**6])}, {"top_p": source.choice([1e-9, 0.3, 0.95, 0.9999])}]
    chosen = {
        k: v for _ in range(2) for k, v in source.choice([*off, {"min_p": source.choice([0.01, 0.4, 1.0])}]).items()
    }
    temperature = source.choice([0.0, 1e-7, 0.3, 0.9, 1.0, 2.5])
    return SamplingParams(max_tokens=9, temperature=temperature, seed=source.randrange(-(2**63), 2**63), **chosen)


def random_sequence(source):
    length = source.randint(1, 2000)
    return Sequence("s", [1] * length, length, random_params(source), b"", choice=source.randrange(4))


@pytest.mark.parametrize(
    ("vocab_size", "scale"), [(1, 1.0), (17, 2.0), (300, 1.0), (5000, 0.2), (6144, 3.0), (9000, 8.0)]
)
def test_tokens_equal_those_of_the_torch_sampler(library, vocab_size, scale):
    source = random.Random(vocab_size)
    torch_sampler, native_sampler = samplers(vocab_size, library)
    for round_ in range(6):
        sequences = [random_sequence(source) for _ in range(source.choice([1, 3, 40]))]
        logits = torch.randn(len(sequences), vocab_size, generator=torch.Generator().manual_seed(round_)) * scale
        logits[:, 1 :: source.choice([2, 7])] = float("-inf")
        logits = logits.mul(8).round().div(8) if round_ % 2 else logits  # many ties
        expected = torch_sampler.sample(logits.clone(), sequences).token_ids
        assert native_sampler.sample(logits.clone(), sequences).token_ids == expected


def test_a_draw_does_not_depend_on_its_batch(library):
    source = random.Random(1)
    _, sampler = samplers(3000, library)
    sequences = [random_sequence(source) for _ in range(20)]
    logits = torch.randn(20, 3000) * 2
    together = sampler.sample(logits.clone(), sequences).token_ids
    alone = [sampler.sample(logits[i : i + 1].clone(), [sequences[i]]).token_ids[0] for i in range(20)]
    assert alone == together


@pytest.mark.parametrize("vocab_size", [1, 7, 64, 300, 6144, 40_003])
def test_logprobs_equal_those_of_torch_and_do_not_depend_on_their_batch(library, vocab_size):
    source = random.Random(vocab_size)
    logits = torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(2)) * 3
    logits[1] = logits[1].round()  # many ties
    logits[2, 1::3] = float("-inf")
    tokens = [source.randrange(vocab_size) for _ in range(5)]
    counts = [min(count, vocab_size) for count in (5, 20, 1, 0, 3)]
    found = list(token_logprobs(library, logits, tokens, counts))
    wanted = logits.double().log_softmax(-1)
    for row, (logprob, top_ids, tops) in enumerate(found):
        assert logprob == pytest.approx(wanted[row, tokens[row]].item(), abs=2e-6, rel=1e-6)
        values = logits[row].tolist()
        assert top_ids == sorted(range(vocab_size), key=lambda i: (-values[i], i))[: counts[row]]
        assert tops == pytest.approx(wanted[row, top_ids].tolist(), abs=2e-6, rel=1e-6)
        assert list(token_logprobs(library, logits[row : row + 1], tokens[row : row + 1], [counts[row]])) == [
            found[row]
        ]
