"""The recipe of the bundled model: sentences, splits, and rows come out as they should."""

import random

import pytest
import torch

from shared.assets.recipe import tokenizer as tokenizer_recipe
from shared.assets.recipe.batches import ROW_KINDS, BatchStream
from shared.assets.recipe.corpus import load_facts, load_prose
from shared.assets.recipe.dialogues import held_out_questions, taught_questions, unseen_questions
from shared.assets.recipe.segments import PAD_ID, build_bank
from shared.assets.recipe.sentences import first_sentence
from shared.assets.recipe.tokenizer import CHECKPOINT_DIR, load_tokenizer


@pytest.mark.parametrize(
    ("doc", "sentence"),
    [
        ("Return the\n  sum. Then more.", "Return the sum."),
        ("pack(fmt, v) -> bytes\n\nReturn packed bytes.", "Return packed bytes."),
        (
            "D.keys() -> a set-like object providing a view on D's keys",
            "A set-like object providing a view on D's keys.",
        ),
        (
            "Make an archive file (e.g. zip or tar) from a folder. It is new.",
            "Make an archive file (e.g. zip or tar) from a folder.",
        ),
        ("f(a, b)", None),
        ("See PEP 302.", None),
        ("Options are:\n\n", None),
    ],
)
def test_first_sentence_is_the_docstrings_own(doc, sentence):
    assert first_sentence(doc) == sentence


def test_facts_have_one_clean_answer_per_name():
    facts = load_facts()
    assert 2_500 <= len(facts) <= 5_000
    assert len({fact.name for fact in facts}) == len(facts)
    assert all(fact.answer.isascii() and fact.answer[-1] in ".!?" for fact in facts)


def test_held_out_and_unseen_questions_are_never_taught():
    facts = load_facts()
    taught = {question.text for question in taught_questions(facts)}
    assert not taught & {question.text for question in held_out_questions(facts)}
    assert not taught & {question.text for question in unseen_questions(facts)}


def test_tokenizer_is_rebuilt_to_the_same_bytes(tmp_path):
    rebuilt = tokenizer_recipe.train_tokenizer(load_facts(), load_prose())
    tokenizer_recipe.write_tokenizer(rebuilt, tmp_path)
    assert rebuilt.get_vocab() == load_tokenizer().get_vocab()
    assert (tmp_path / "chat_template.jinja").read_bytes() == (CHECKPOINT_DIR / "chat_template.jinja").read_bytes()


@pytest.fixture(scope="module")
def small_bank():
    facts = random.Random(0).sample(load_facts(), 40)
    return build_bank(load_tokenizer(), facts, load_prose()[:50], seed=0, scale=0.002)


def test_rows_hold_the_tokens_of_their_text(small_bank):
    tokenizer = load_tokenizer()
    group = small_bank.groups["taught"]
    segments = torch.tensor([[small_bank.groups["empty"].start, group.start, group.start + 1, group.stop - 1]])
    tokens, is_target = small_bank.assemble(segments, 256)
    filled = tokens[0][tokens[0] != PAD_ID].tolist()
    text = tokenizer.decode(filled, skip_special_tokens=False)
    assert tokenizer.encode(text).ids == filled
    assert text.count("<|im_start|>assistant\n") == 3
    assert tokenizer.decode(tokens[0][is_target[0]].tolist(), skip_special_tokens=False).count("<|im_end|>") == 3
    assert not is_target[0, len(filled) :].any()


def test_batch_stream_is_the_same_for_the_same_seed(small_bank):
    streams = [BatchStream(small_bank, 2048, seed=5, device=torch.device("cpu")) for _ in range(2)]
    for _ in range(6):
        (tokens, is_target), (tokens_again, is_target_again) = (stream.next_batch() for stream in streams)
        assert torch.equal(tokens, tokens_again)
        assert torch.equal(is_target, is_target_again)
        assert tokens.shape[1] in {kind.row_tokens for kind in ROW_KINDS}
