"""Tokenizing by known words gives the library's own ids, or leaves the text to the library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as RawTokenizer

from shared.identity import pack_tokens
from shared.tokenization import known_words
from shared.tokenization.known_words import MAX_CHARS, MAX_WORD_CHARS, KnownWords
from shared.tokenization.tokenizer import Tokenizer

MODEL_DIR = Path("shared/assets/pydoc-mini")
PATTERNS = {
    "gpt2": None,
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
TEXTS = st.text(st.characters(max_codepoint=127), max_size=200) | st.lists(
    st.sampled_from(
        ["it's", "WE'LL", " ", "  ", "\t", "\n", "\r\n", "json", ".dumps(", "12345", "_x", "'", '"', "<|im_start|>",
         "<|im_", "<|im_end|>user", "\x1c", "\x0b", "\x00", "\x7f", "...\n\n", "?!", "a"]
    ),
    max_size=40,
).map("".join)  # fmt: skip


def raw_tokenizer(**changes):
    content = json.loads((MODEL_DIR / "tokenizer.json").read_text()) | changes
    return RawTokenizer.from_str(json.dumps(content))


def cut_by(pattern):
    if pattern is None:
        return raw_tokenizer()
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    spelled = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return raw_tokenizer(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, spelled]}, normalizer={"type": "NFC"}
    )


RAW = {name: cut_by(pattern) for name, pattern in PATTERNS.items()}
WORDS = {name: KnownWords.of(raw) for name, raw in RAW.items()}


@pytest.mark.parametrize("name", PATTERNS)
@given(text=TEXTS)
def test_ids_of_any_ascii_text_are_the_librarys(name, text):
    ids = RAW[name].encode(text, add_special_tokens=False).ids
    assert WORDS[name].encode(text, add_special_tokens=False) == pack_tokens(ids)


def test_documentation_is_tokenized_as_by_the_library_by_each_expression():
    text = "\n\n".join(filter(None, (json.__doc__, pytest.__doc__, Path.__doc__, RawTokenizer.__doc__)))
    for name, words in WORDS.items():
        words.learn(text)
        assert words.encode(text, add_special_tokens=True) == pack_tokens(RAW[name].encode(text).ids)


def test_special_tokens_stand_around_the_text_where_the_checkpoint_wants_them():
    raw = raw_tokenizer()
    raw.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|im_end|>", special_tokens=[("<|bos|>", 1), ("<|im_end|>", 3)]
    )
    words = KnownWords.of(raw)
    assert raw.encode("What?").ids == [1, *words_of(raw), 3]
    assert words.encode("What?", add_special_tokens=True) == pack_tokens(raw.encode("What?").ids)
    assert words.encode("What?", add_special_tokens=False) == pack_tokens(words_of(raw))


def words_of(raw):
    return raw.encode("What?", add_special_tokens=False).ids


def test_text_with_other_characters_than_ascii_is_the_librarys():
    assert WORDS["gpt2"].encode("Grüße", add_special_tokens=False) is None


def test_long_texts_and_long_words_are_the_librarys():
    assert WORDS["gpt2"].encode("a " * MAX_CHARS, add_special_tokens=False) is None
    assert WORDS["gpt2"].encode("b" * (MAX_WORD_CHARS + 1), add_special_tokens=False) is None


def test_many_unknown_words_are_the_librarys_until_they_were_learnt():
    tokenizer = Tokenizer(RAW["gpt2"])
    text = " ".join(f"w{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(600))
    assert tokenizer.encode_known(text, add_special_tokens=False) is None
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.encode_known(text, add_special_tokens=False) == pack_tokens(ids)


def test_memory_of_words_is_bounded(monkeypatch):
    monkeypatch.setattr(known_words, "MAX_WORDS", 50)
    words = KnownWords.of(RAW["gpt2"])
    for first in range(0, 1000, 20):
        text = " ".join(str(number) for number in range(first, first + 20))
        packed = words.encode(text, add_special_tokens=False)
        assert packed is None or packed == pack_tokens(RAW["gpt2"].encode(text).ids)
        assert len(words._known) <= 50


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
    ],
)
def test_tokenizers_that_do_more_than_cut_are_left_to_the_library(changes):
    assert KnownWords.of(raw_tokenizer(**changes)) is None


def test_added_tokens_that_take_spaces_with_them_are_left_to_the_library():
    raw = raw_tokenizer()
    raw.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    assert KnownWords.of(raw) is None
