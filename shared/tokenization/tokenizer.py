"""A checkpoint's tokenizer, as far as serving needs it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as RawTokenizer

from shared.errors import ConfigurationError
from shared.tokenization.known_words import KnownWords
from shared.tokenization.token_bytes import token_byte_table


class Tokenizer:
    """Immutable and safe to use from several threads; encoding releases the GIL.

    Attributes:
        texts: Per token id its text as the output stream shows it, or None when the token is not whole UTF-8 by itself.
            Special tokens show as "".
        special_ids: Tokens that steer the model and never appear in output text.
    """

    def __init__(self, raw: RawTokenizer) -> None:
        self._raw = raw
        self._bytes = token_byte_table(raw)
        self._known_words = KnownWords.of(raw)
        self._max_token_bytes = max(map(len, self._bytes), default=1)
        self.special_ids = frozenset(i for i, token in raw.get_added_tokens_decoder().items() if token.special)
        self.texts: list[str | None] = [_whole_text(raw_bytes) for raw_bytes in self._bytes]
        for token_id in self.special_ids:
            self.texts[token_id] = ""

    @classmethod
    def from_pretrained(cls, directory: Path) -> Tokenizer:
        """Reads `tokenizer.json`.

        Raises:
            ConfigurationError: The file is missing, broken, or of a family that is not supported.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ConfigurationError(f"{directory} has no tokenizer.json; a fast tokenizer is needed")
        try:
            raw = RawTokenizer.from_file(str(path))
        except Exception as exc:  # the library raises plain Exception for every defect of the file
            raise ConfigurationError(f"{path}: {exc}") from exc
        raw.no_truncation()
        raw.no_padding()
        return cls(raw)

    def __len__(self) -> int:
        return len(self._bytes)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; blocks for about a millisecond per 4,000 characters."""
        [encoding] = self._raw.encode_batch_fast([text], add_special_tokens=add_special_tokens)  # without offsets
        ids: list[int] = encoding.ids
        if self._known_words is not None:
            self._known_words.learn(text)
        return ids

    def encode_known(self, text: str, *, add_special_tokens: bool) -> bytes | None:
        """The same ids, packed, at a fraction of the cost where the text's words are known, else None.

        See `KnownWords`, and `pack_tokens`.
        """
        if self._known_words is None:
            return None
        return self._known_words.encode(text, add_special_tokens=add_special_tokens)

    def least_tokens(self, text: str) -> int:
        """So many tokens a text has at least, at no cost; 0 where nothing is known of how the tokenizer cuts it."""
        if self._known_words is None:
            return 0
        # NFC makes at most three characters one of two bytes.
        least_bytes = len(text) if text.isascii() else len(text) // 2
        return least_bytes // self._max_token_bytes

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole run of tokens."""
        special = self.special_ids if skip_special_tokens else frozenset()
        return b"".join(self.token_bytes(i) for i in token_ids if i not in special).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for, special tokens by their name; b"" for ids that only pad the vocabulary."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def token_name(self, token_id: int) -> str:
        """The vocabulary's own spelling of a token; "" for ids that only pad the vocabulary."""
        name: str | None = self._raw.id_to_token(token_id)
        return name or ""

    def special_id(self, text: str) -> int | None:
        """The special token of that name, if there is one."""
        token_id = self._raw.token_to_id(text)
        return token_id if token_id in self.special_ids else None

    def token_text(self, token_id: int) -> str:
        """The same for people to read: bytes that are not whole UTF-8 become U+FFFD."""
        text = self.texts[token_id] if 0 <= token_id < len(self.texts) else None
        return text or self.token_bytes(token_id).decode(errors="replace")


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a checkpoint; {} when there is no such file.

    Raises:
        ConfigurationError: Not JSON, or not an object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise ConfigurationError(f"{path}: {exc}") from exc
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} holds no JSON object")
    return content


def _whole_text(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None
