"""Reads one tool call, a JSON object, character by character, and lets its arguments out while they are written."""

from __future__ import annotations

import json

_ARGUMENT_KEYS = ("arguments", "parameters")
_SPACE = " \t\r\n"


class ValueScanner:
    """Follows one JSON value. It need not be valid inside: brackets outside of strings are counted, no more."""

    __slots__ = ("_depth", "_has_begun", "_is_escaped", "_is_in_string", "is_done")

    def __init__(self) -> None:
        self._depth = 0
        self._has_begun = self._is_in_string = self._is_escaped = False
        self.is_done = False

    def push(self, char: str) -> bool:
        """Follows a character; False if it belongs no more to the value, which was a bare word and is done now."""
        if self._is_in_string:
            self._push_in_string(char)
        elif char == '"':
            self._is_in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]" and self._depth:
            self._depth -= 1
            self.is_done = not self._depth
        elif not self._depth and self._has_begun and char in ",}]" + _SPACE:
            self.is_done = True
            return False
        self._has_begun = True
        return True

    def _push_in_string(self, char: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._is_in_string = False
            self.is_done = not self._depth


class CallScanner:
    """Reads `{"name": "f", "arguments": {...}}`, keys in any order.

    Attributes:
        name: Of the function, when it is known.
        is_done: The object is complete.
        is_broken: It is no such object; nothing more can be read.
    """

    __slots__ = ("_arguments", "_has_begun", "_key", "_parts", "_value", "is_broken", "is_done", "name")

    def __init__(self) -> None:
        self.name: str | None = None
        self.is_done = self.is_broken = False
        self._has_begun = False
        self._key: str | None = None  # whose value comes next
        self._value: ValueScanner | None = None
        self._parts: list[str] = []  # of the key or value being read, unless it is let out at once
        self._arguments = ""  # read and not let out

    def push(self, char: str) -> None:
        """Follows a character."""
        if self._value is not None:
            self._push_value(self._value, char)
        elif not self._has_begun:
            self._has_begun = char == "{"
            self.is_broken = not self._has_begun and char not in _SPACE
        elif char == "}":
            self._end()
        elif char == '"' or (self._key is not None and char not in _SPACE + ",:"):
            self._value = ValueScanner()
            self._push_value(self._value, char)
        elif char not in _SPACE + ",:":
            self.is_broken = True

    def take_arguments(self) -> str:
        """Arguments that were read since; nothing before the name is known."""
        if self.name is None:
            return ""
        taken, self._arguments = self._arguments, ""
        return taken

    def _push_value(self, value: ValueScanner, char: str) -> None:
        is_part = value.push(char)
        if is_part:
            is_open_object = self._key in _ARGUMENT_KEYS and (self._parts == ["{"] or (not self._parts and char == "{"))
            if is_open_object:
                self._parts = ["{"]  # only says of what kind it is
                self._arguments += char
            else:
                self._parts.append(char)
        if value.is_done:
            self._value = None
            self._finish_value("".join(self._parts))
            self._parts = []
            if not is_part:
                self.push(char)

    def _finish_value(self, text: str) -> None:
        if self._key is None:
            self._key = _string(text)
            self.is_broken |= self._key is None
            return
        if self._key == "name" and self.name is None:
            self.name = _string(text)
            self.is_broken |= not self.name
        elif self._key in _ARGUMENT_KEYS and text != "{":
            written = _string(text)  # some models write the object into a string
            self._arguments += (text if text != "null" else "{}") if written is None else written
        self._key = None

    def _end(self) -> None:
        if self.name is None:
            self.is_broken = True
        self.is_done = True


def _string(text: str) -> str | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
