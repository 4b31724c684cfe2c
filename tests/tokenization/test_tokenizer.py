"""Token bytes and encoding, against the tokenizers library itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from shared.errors import ConfigurationError
from shared.tokenization.token_bytes import byte_alphabet, token_byte_table
from shared.tokenization.tokenizer import Tokenizer

MODEL_DIR = Path("shared/assets/pydoc-mini")
TEXTS = ["What does json.dumps do?", "Grüße, 世界 🎉", "\n\ttabs  and   spaces ", "naïve café 👩‍👩‍👧‍👦", ""]


def sentencepiece_like():
    """A byte-fallback tokenizer of Llama 2's kind, small enough to write down."""
    vocab = {"<unk>": 0, "<s>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    for token in ["▁", "H", "i", "▁H", "▁Hi"]:
        vocab[token] = len(vocab)
    raw = RawTokenizer(
        models.BPE(vocab, [("▁", "H"), ("▁H", "i")], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens([AddedToken("<s>", special=True)])
    return raw


def test_byte_alphabet_is_a_bijection():
    assert sorted(byte_alphabet().values()) == list(range(256))


@pytest.mark.parametrize("text", TEXTS)
def test_decode_equals_the_librarys(text):
    tokenizer, raw = Tokenizer.from_pretrained(MODEL_DIR), RawTokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    ids = tokenizer.encode(f"<|im_start|>{text}<|im_end|>", add_special_tokens=False)
    assert ids == raw.encode(f"<|im_start|>{text}<|im_end|>").ids
    assert tokenizer.decode(ids) == raw.decode(ids) == text


@pytest.mark.parametrize("text", ["Hi Hi", "Hi é 🎉 Hi", "xyz"])
def test_byte_fallback_tokens_are_joined_to_characters(text):
    raw = sentencepiece_like()
    tokenizer = Tokenizer(raw)
    ids = raw.encode(text).ids
    assert tokenizer.decode(ids).lstrip(" ") == raw.decode(ids) == text


def test_special_tokens_have_no_text_but_a_name():
    tokenizer = Tokenizer.from_pretrained(MODEL_DIR)
    [end] = tokenizer.encode("<|im_end|>", add_special_tokens=False)
    assert tokenizer.texts[end] == ""
    assert tokenizer.token_text(end) == "<|im_end|>"


@pytest.mark.parametrize(
    "text",
    ["", "a", " " * 999, "json.dumps " * 50, "\n\t" * 70, "é" * 99, "\u03c5\u0308\u0301" * 99, "<|im_start|>" * 9],
)
def test_a_text_has_at_least_the_tokens_that_it_is_said_to_have(text):
    tokenizer = Tokenizer.from_pretrained(Path("shared/assets/pydoc-mini"))
    assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))
    assert bool(tokenizer.least_tokens(text * 1000)) == bool(text)


def test_ids_that_pad_the_vocabulary_have_no_bytes():
    tokenizer = Tokenizer.from_pretrained(MODEL_DIR)
    assert tokenizer.token_bytes(10**6) == b"" == tokenizer.token_bytes(-1)


def test_directory_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=str(tmp_path)):
        Tokenizer.from_pretrained(tmp_path)


def test_broken_file_is_a_configuration_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)


def test_unsupported_decoder_is_named(tmp_path):
    content = json.loads((MODEL_DIR / "tokenizer.json").read_text())
    content["decoder"] = {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigurationError, match="CTC"):
        Tokenizer.from_pretrained(tmp_path)


def test_word_pieces_are_words_and_their_continuations():
    raw = RawTokenizer(models.WordPiece({"[UNK]": 0, "cat": 1, "##s": 2}, unk_token="[UNK]"))
    raw.decoder = decoders.WordPiece()
    assert token_byte_table(raw) == [b" [UNK]", b" cat", b"s"]
