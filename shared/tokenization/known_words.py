"""Tokenizing by words that were tokenized before: several times as fast as the library, and nothing else.

Byte-level tokenizers cut a text into words by a regular expression and tokenize each word by itself, so the tokens of a
text are its words' tokens, one after the other. Words repeat: after a few requests nearly all are known, and what is
left of tokenizing is the cut and a look-up per word.

This is for ASCII texts and for the expressions below, whose character classes are easily said for ASCII; everything
else is the library's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping

from tokenizers import Tokenizer as RawTokenizer

from shared.identity import pack_tokens
from shared.tokenization.token_bytes import byte_alphabet

MAX_CHARS = 32_768
"""Longer texts hold the GIL for more than about two milliseconds; the library releases it."""
MAX_NEW_WORDS = 256
"""Learning a word takes some microseconds."""
MAX_WORD_CHARS = 128
MAX_WORDS = 65_536

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_KNOWN_PATTERNS = frozenset({_GPT2, _LLAMA3, _QWEN2})

Packed = bytes
"""Token ids as `pack_tokens` packs them: those of words are joined in one go."""


class KnownWords:
    """Words and their tokens; grows by use, within bounds. Safe to use from several threads.

    Args:
        raw: The library's tokenizer.
        pattern: Cuts an ASCII text into words.
        marks: Tokens that are recognized in a text before it is cut.
        around: Tokens before and after every text with special tokens.
    """

    def __init__(
        self, raw: RawTokenizer, pattern: re.Pattern[str], marks: Mapping[str, int], around: tuple[Packed, Packed]
    ) -> None:
        self._model = raw.model
        self._cut: Callable[[str], list[str]] = pattern.findall
        # Of several that begin at one character the longest counts.
        longest_first = sorted(marks, key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, longest_first))) if marks else None
        self._known_marks: dict[str, Packed] = {mark: pack_tokens([token_id]) for mark, token_id in marks.items()}
        self._known = dict(self._known_marks)
        self._before, self._after = around
        self._spelling = {byte: char for char, byte in byte_alphabet().items() if byte < 128}

    @classmethod
    def of(cls, raw: RawTokenizer) -> KnownWords | None:
        """None for a tokenizer whose texts are not simply its words."""
        description = json.loads(raw.to_str())
        source = _word_pattern(description["pre_tokenizer"])
        added = raw.get_added_tokens_decoder()
        if (
            source not in _KNOWN_PATTERNS
            or (description["normalizer"] or {"type": "NFC"})["type"] != "NFC"  # which changes no ASCII
            or description["model"].get("dropout")
            or any(token.single_word or token.lstrip or token.rstrip or token.normalized for token in added.values())
        ):
            return None
        around = _around(raw)
        marks = {token.content: token_id for token_id, token in added.items()}
        return cls(raw, _for_ascii(source), marks, around) if around is not None else None

    def encode(self, text: str, *, add_special_tokens: bool) -> Packed | None:
        """Tokens as the library gives them; None where it must be asked. Holds the GIL, two ms at most."""
        if len(text) > MAX_CHARS or not text.isascii():
            return None
        words = self._words(text)
        try:
            packed = _joined(self._known, words)
        except KeyError:
            if not self._learn(words, MAX_NEW_WORDS):
                return None
            packed = _joined(self._known, words)
        return self._before + packed + self._after if add_special_tokens else packed

    def learn(self, text: str) -> None:
        """Learns the words of a text that the library was asked for."""
        if len(text) <= MAX_CHARS and text.isascii():
            self._learn(self._words(text), MAX_WORDS)

    def _words(self, text: str) -> list[str]:
        """Words and marks, in order."""
        if self._marks is None or self._marks.search(text) is None:
            return self._cut(text)
        words: list[str] = []
        start = 0
        for mark in self._marks.finditer(text):
            words += self._cut(text[start : mark.start()])
            words.append(mark[0])
            start = mark.end()
        return words + self._cut(text[start:])

    def _learn(self, words: Iterable[str], limit: int) -> bool:
        """Whether all words are known now: not if too many were not, or one is too long to be kept."""
        new = set(words) - self._known.keys()
        if len(new) > limit or any(len(word) > MAX_WORD_CHARS for word in new):
            return False
        learnt = {word: self._tokenized(word) for word in new}
        if len(self._known) + len(learnt) > MAX_WORDS:
            self._known = dict(self._known_marks)
            return False
        self._known.update(learnt)
        return True

    def _tokenized(self, word: str) -> Packed:
        spelled = "".join([self._spelling[ord(char)] for char in word])
        return pack_tokens([token.id for token in self._model.tokenize(spelled)])


def _joined(known: Mapping[str, Packed], words: Iterable[str]) -> Packed:
    return b"".join(map(known.__getitem__, words))


def _word_pattern(pre_tokenizer: dict[str, object] | None) -> str | None:
    """The expression by which a byte-level pre-tokenizer cuts; None if it is none, or does more."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return _GPT2
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(source)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return source
    return None


def _for_ascii(source: str) -> re.Pattern[str]:
    """One of the expressions above where all characters are ASCII."""
    source = source.replace(r"\p{L}\p{N}]", "A-Za-z0-9]").replace(r"\p{L}", "[A-Za-z]").replace(r"\p{N}", "[0-9]")
    # Most words are letters and begin with one or with a space, where each expression takes just them: tried first.
    return re.compile(r" [A-Za-z]+|[A-Za-z]+|" + source, re.ASCII)


def _around(raw: RawTokenizer) -> tuple[Packed, Packed] | None:
    """What the post-processor puts around every text; None if that is not simply the same."""
    plain = raw.encode("a", add_special_tokens=False).ids
    full = raw.encode("a", add_special_tokens=True).ids
    starts = [start for start in range(len(full)) if plain and full[start : start + len(plain)] == plain]
    if len(starts) != 1:
        return None
    return pack_tokens(full[: starts[0]]), pack_tokens(full[starts[0] + len(plain) :])
