"""The bytes that each token stands for, so that detokenizing is joining bytes.

Families of tokenizers are told apart by the decoder that `tokenizer.json` names, the last one being encoders':

    ByteLevel                       every character of a token spells one byte (GPT-2's alphabet)
    Replace/Metaspace+ByteFallback  text with a mark for the space, and tokens "<0xAB>" for single bytes
    WordPiece                       a token begins a word, unless its mark says that it goes on with one
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial

from tokenizers import Tokenizer as RawTokenizer

from shared.errors import ConfigurationError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "\u2581"


def byte_alphabet() -> dict[str, int]:
    """Character to byte in GPT-2's alphabet: printable Latin-1 stands for itself, the others for U+0100 onwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def token_byte_table(raw: RawTokenizer) -> list[bytes]:
    """Bytes by token id; b"" for ids that have no token.

    Raises:
        ConfigurationError: The tokenizer's decoder is of no such family.
    """
    decoder = json.loads(raw.to_str())["decoder"]
    kinds = _decoder_kinds(decoder)
    vocab = raw.get_vocab(with_added_tokens=True)
    literal = {token_id: token.content for token_id, token in raw.get_added_tokens_decoder().items()}
    if "ByteLevel" in kinds:
        return _table(vocab, literal, partial(_byte_level, alphabet=byte_alphabet()))
    if "ByteFallback" in kinds or "Metaspace" in kinds:
        return _table(vocab, literal, _byte_fallback)
    if kinds == ["WordPiece"]:
        return _table(vocab, literal, partial(_word_piece, mark=decoder["prefix"]))
    raise ConfigurationError(
        f"tokenizer.json has the decoder {', '.join(kinds) or 'none'}; supported are ByteLevel, ByteFallback, WordPiece"
    )


def _decoder_kinds(decoder: Mapping[str, object] | None) -> list[str]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        parts = decoder["decoders"]
        assert isinstance(parts, list)
        return [str(part["type"]) for part in parts]
    return [str(decoder["type"])]


def _byte_level(token: str, alphabet: Mapping[str, int]) -> bytes:
    try:
        return bytes([alphabet[char] for char in token])
    except KeyError:  # a token that was added outside the alphabet
        return token.encode()


def _byte_fallback(token: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace(_SPACE_MARK, " ").encode()


def _word_piece(token: str, mark: str) -> bytes:
    return (token.removeprefix(mark) if token.startswith(mark) else f" {token}").encode()


def _table(vocab: Mapping[str, int], literal: Mapping[int, str], to_bytes: Callable[[str], bytes]) -> list[bytes]:
    table = [b""] * (max(vocab.values(), default=-1) + 1)
    for token, token_id in vocab.items():
        table[token_id] = literal[token_id].encode() if token_id in literal else to_bytes(token)
    return table
