"""Builds server-sent chunks; a chunk that carries nothing but text is joined from bytes made once per choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import orjson

TEXT_MARK = "\x00text\x00"
_TEXT_JSON = orjson.dumps(TEXT_MARK)


def event(content: dict[str, object]) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(content) + b"\n\n"


class ChunkTemplate:
    """Chunks of one reply: the same head, a choice that differs, and `"usage": null` if usage will follow at the end.

    Args:
        head: `id`, `object`, `created`, `model`.
        text_choice: Builds the choice of a chunk that carries only text, from its index and its text.
    """

    def __init__(
        self, head: dict[str, object], text_choice: Callable[[int, str], dict[str, object]], *, has_usage: bool
    ) -> None:
        self._head = head
        self._text_choice = text_choice
        self._tail: dict[str, object] = {"usage": None} if has_usage else {}
        self._parts: dict[int, tuple[bytes, bytes]] = {}

    def choice(self, choice: dict[str, object], extra: Mapping[str, object] | None = None) -> bytes:
        """A chunk with one choice; `extra` are fields of the chunk."""
        return event({**self._head, "choices": [choice], **self._tail, **(extra or {})})

    def text(self, index: int, text: str) -> bytes:
        """A chunk with nothing but text."""
        before, after = self.around_text(index)
        return before + orjson.dumps(text) + after

    def around_text(self, index: int) -> tuple[bytes, bytes]:
        """What comes before and after the text in such a chunk."""
        parts = self._parts.get(index)
        if parts is None:
            before, after = self.choice(self._text_choice(index, TEXT_MARK)).split(_TEXT_JSON)
            parts = self._parts[index] = before, after
        return parts

    def ending(self, extra: dict[str, object]) -> bytes:
        """The last chunk: no choice, but usage or timing."""
        return event({**self._head, "choices": [], **extra})
