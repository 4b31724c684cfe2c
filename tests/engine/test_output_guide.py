"""Which tokens an output may get next, and how that is applied to a batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from services.gateway.syntax.grammar_text import Structure, StructureKind, grammar_text
from shared.engine.grammar import GrammarCompiler, OutputGrammar
from shared.engine.output_guide import OutputGuide
from shared.engine.prompt_scores import score_prompt
from shared.engine.sampler import Sampler
from shared.engine.sampling_params import SamplingParams
from shared.engine.sequence import Sequence
from shared.engine.step import ScheduledSequence
from shared.engine.thinking import Thinking
from shared.identity import BlockHash, SessionId

MODEL = Path("shared/assets/pydoc-mini")
VOCAB, EOS = 6144, 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def compiler():
    return GrammarCompiler((MODEL / "tokenizer.json").read_text(), VOCAB, [EOS])


@pytest.fixture
def guide(compiler):
    def build(grammar: str = "", vocab_size: int = VOCAB, **params) -> OutputGuide:
        compiled = OutputGrammar(compiler.matcher(grammar)) if grammar else None
        sampling = SamplingParams(max_tokens=50, grammar=grammar, **params)
        return OutputGuide(sampling, compiled, frozenset({EOS}), vocab_size)

    return build


def regex(pattern: str) -> str:
    return grammar_text(Structure(StructureKind.REGEX, pattern, "regex"), None)


def allowed(guide: OutputGuide, output: list[int], vocab_size: int = VOCAB) -> set[int]:
    row = np.zeros(-(-vocab_size // 32), dtype=np.uint32)
    guide.fill(output, row)
    return set(np.nonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))[0].tolist())


def test_only_allowed_tokens_may_come(guide):
    assert allowed(guide(allowed_token_ids=frozenset({5, 70, 99})), []) == {5, 70, 99}


def test_bits_end_with_the_vocabulary(guide):
    assert allowed(guide(bad_words=((7,),), vocab_size=70), [], 70) == set(range(70)) - {7}


def test_bad_word_is_banned_when_its_beginning_is_there(guide):
    bad = guide(bad_words=((8, 9), (4,)))
    assert {4, 9} - allowed(bad, []) == {4}
    assert {4, 9} - allowed(bad, [8]) == {4, 9}
    assert {4, 9} - allowed(bad, [8, 5]) == {4}


def test_end_waits_for_min_tokens_unless_the_grammar_has_nothing_else(guide):
    assert EOS not in allowed(guide(min_tokens=2, bad_words=((9,),)), [300])
    assert EOS in allowed(guide(min_tokens=2, bad_words=((9,),)), [300, 301])
    short = guide(regex("a"), min_tokens=5)
    (a,) = [token for token in allowed(short, []) if token < 100]
    assert allowed(short, [a]) == {EOS}


def test_what_bans_everything_gives_way(guide):
    assert allowed(guide(allowed_token_ids=frozenset({5}), bad_words=((5,),)), []) == {5}


def test_grammar_begins_after_reasoning(guide):
    thinking = Thinking(start_id=10, end_ids=(11, 12))
    follows = guide(regex("[0-9]"), thinking=thinking)
    first = allowed(follows, [])
    assert 10 in first  # may open
    assert EOS not in allowed(follows, [10])  # an output of thoughts alone would match nothing
    assert len(allowed(follows, [10, 500])) == VOCAB - 1
    assert len(allowed(follows, [10, 500, 11])) == VOCAB - 1
    assert allowed(follows, [10, 500, 11, 12]) == first - {10}


def test_reasoning_without_budget_left_is_closed(guide):
    thinking = Thinking(start_id=-1, end_ids=(11, 12), is_open=True, max_tokens=2)
    closes = guide(thinking=thinking)
    assert len(allowed(closes, [500])) == VOCAB
    assert allowed(closes, [500, 501]) == {11}
    assert allowed(closes, [500, 501, 11]) == {12}
    assert len(allowed(closes, [500, 501, 11, 12])) == VOCAB


def test_reasoning_that_ends_in_time_is_left_alone(guide):
    thinking = Thinking(start_id=-1, end_ids=(11,), is_open=True, max_tokens=3)
    assert len(allowed(guide(thinking=thinking), [500, 11, 500, 500, 500])) == VOCAB


def sequence_of(guide: OutputGuide | None, output: list[int], **params) -> Sequence:
    sampling = SamplingParams(max_tokens=50, **params)
    return Sequence(SessionId("s"), [1, 2, *output], 2, sampling, BlockHash(b""), guide=guide)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guided_rows_of_a_batch_keep_to_their_masks_and_others_to_themselves(guide, temperature):
    sampler = Sampler(VOCAB, frozenset({EOS}), max_logprobs=5, device=CPU)
    only = guide(allowed_token_ids=frozenset({77}))
    params = {"temperature": temperature, "seed": 3, "num_logprobs": 1, "top_p": 0.9}
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    plain = [sequence_of(None, [], **params) for _ in range(3)]
    sampler.begin(plain)
    free = sampler.sample(logits.clone(), plain)
    mixed = [sequence_of(None, [], **params), sequence_of(only, [], **params), sequence_of(None, [], **params)]
    sampler.begin(mixed)
    held = sampler.sample(logits.clone(), mixed)
    assert held.token_ids == [free.token_ids[0], 77, free.token_ids[2]]
    raw = torch.log_softmax(logits[1], dim=-1)
    assert held.logprobs[1].logprob == pytest.approx(raw[77].item(), abs=1e-4)  # before any edit
    assert held.logprobs[1].top_token_ids == [raw.argmax().item()]


@pytest.mark.parametrize("chunks", [[200], [1, 63, 64, 72], [199, 1], [150, 50]])
def test_prompt_scores_do_not_depend_on_chunks(chunks):
    generator = torch.Generator().manual_seed(1)
    hidden, head = torch.randn(200, 8, generator=generator), torch.randn(40, 8, generator=generator)
    tokens = torch.randint(40, (200,), generator=generator).tolist()
    params = SamplingParams(max_tokens=1)
    sequence = Sequence(SessionId("s"), tokens, 200, params, BlockHash(b""), num_prompt_logprobs=3)
    logprobs, ranks, tops, done = [], [], [], 0
    for size in chunks:
        item = ScheduledSequence(sequence, done, size, False)
        scores = score_prompt(item, hidden[done : done + size], lambda rows: rows @ head.T)
        if scores is not None:
            sequence.num_scored_tokens += len(scores.logprobs)
            logprobs, ranks, tops = logprobs + scores.logprobs, ranks + scores.ranks, tops + scores.top_token_ids
        done += size
    want = torch.log_softmax(hidden @ head.T, dim=-1)[:-1]
    assert logprobs == pytest.approx(want.gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1).tolist(), abs=1e-4)
    assert tops == want.topk(3).indices.tolist()
    assert ranks == [(row > row[token]).sum().item() + 1 for row, token in zip(want, tokens[1:], strict=True)]
    assert not sequence.is_scoring
