"""Tokens to text as they arrive: only whole UTF-8 characters leave."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from shared.tokenization.tokenizer import Tokenizer

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class IncrementalDetokenizer:
    """One choice's text so far. Bytes of an unfinished character are held back until it is complete.

    The concatenation of everything returned equals `Tokenizer.decode` of all tokens, but for special tokens that show.

    Args:
        tokenizer: The model's.
        shown: Special tokens that show by their names.
    """

    __slots__ = ("_decoder", "_has_pending", "_shown", "_special", "_texts", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, shown: frozenset[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._texts = tokenizer.texts
        self._special = tokenizer.special_ids - shown
        self._shown = shown
        self._decoder = _Utf8Decoder(errors="replace")
        self._has_pending = False

    def push_all(self, token_ids: Sequence[int]) -> str:
        """Text that became complete with these tokens: mostly it is one, and whole text by itself."""
        if len(token_ids) == 1:
            return self.push(token_ids[0])
        return "".join([self.push(token_id) for token_id in token_ids])

    def push(self, token_id: int) -> str:
        """Text that became complete with this token."""
        if not self._has_pending and token_id < len(self._texts) and token_id not in self._shown:
            text = self._texts[token_id]
            if text is not None:
                return text
        if token_id in self._special:
            return ""
        text = self._decoder.decode(self._tokenizer.token_bytes(token_id))
        self._has_pending = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never became complete."""
        self._has_pending = False
        return self._decoder.decode(b"", final=True)
