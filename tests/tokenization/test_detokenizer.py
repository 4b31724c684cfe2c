"""Incremental detokenizing shows whole characters only, and all of them."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from shared.tokenization.detokenizer import IncrementalDetokenizer
from shared.tokenization.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_pretrained(Path("shared/assets/pydoc-mini"))


def pieces(ids):
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    return [detokenizer.push(token_id) for token_id in ids], detokenizer.flush()


def test_character_of_several_tokens_comes_out_whole():
    ids = TOKENIZER.encode("a🎉b", add_special_tokens=False)
    shown, rest = pieces(ids)
    assert len(ids) > 3
    assert [piece for piece in shown if piece] == ["a", "🎉", "b"]
    assert rest == ""


def test_unfinished_character_becomes_a_replacement_at_the_end():
    ids = TOKENIZER.encode("a🎉", add_special_tokens=False)[:-1]
    shown, rest = pieces(ids)
    assert "".join(shown) == "a"
    assert rest == "\ufffd"


def test_special_token_inside_a_character_changes_nothing():
    ids = TOKENIZER.encode("🎉", add_special_tokens=False)
    shown, _ = pieces([ids[0], 2, *ids[1:]])
    assert "".join(shown) == "🎉"


@given(st.text())
def test_pieces_of_any_text_add_up_to_it(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    shown, rest = pieces(ids)
    assert "".join(shown) + rest == TOKENIZER.decode(ids)
    assert all("\ufffd" not in piece for piece in shown) or "\ufffd" in text


@given(st.lists(st.integers(0, len(TOKENIZER) + 5), max_size=60))
def test_pieces_of_any_tokens_add_up_to_decoding_them_at_once(ids):
    shown, rest = pieces(ids)
    assert "".join(shown) + rest == TOKENIZER.decode(ids)
