"""Tells tool calls from text while it arrives, one parser for each family.

Parsers look at one character at a time, so how the text was cut into pieces cannot matter. White space between text and
calls is dropped. What looked like a call and is none is text after all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from services.gateway.syntax.call_scanner import CallScanner, ValueScanner
from services.gateway.syntax.families import ToolFamily
from services.gateway.syntax.pieces import CallPiece, Pieces

_SPACE = " \t\r\n"


class ToolParser(ABC):
    """Follows one choice's text; mutable.

    Args:
        max_calls: Later ones are dropped; None = no limit.
    """

    def __init__(self, max_calls: int | None = None) -> None:
        self._max_calls = max_calls
        self._pieces = Pieces()
        self._num_calls = 0
        self._space = ""  # held back: it may precede a call
        self._raw = ""  # of what may be a call, and is text if it is none
        self._call: CallScanner | None = None

    @property
    def num_calls(self) -> int:
        """Calls so far."""
        return self._num_calls

    def push(self, text: str) -> Pieces:
        """What became known with more text."""
        for char in text:
            self._step(char)
        return self._take()

    def finish(self) -> Pieces:
        """What is left at the end.

        A call that was cut off stays as it is if its name is known; else it is text, or after other calls nothing.
        """
        if self._raw and not self._num_calls and (self._call is None or self._call.name is None):
            self._say(self._raw)
        if self._space and not self._num_calls:
            self._pieces.text += self._space
        self._raw = self._space = ""
        return self._take()

    @abstractmethod
    def _step(self, char: str) -> None:
        """Follows one character."""

    def _take(self) -> Pieces:
        taken, self._pieces = self._pieces, Pieces()
        return taken

    def _say(self, text: str) -> None:
        """Text that is no call; white space waits for what comes next."""
        body = text.rstrip(_SPACE)
        if not body:
            self._space += text
            return
        lead = self._space + body
        self._pieces.text += lead.lstrip(_SPACE) if self._follows_call else lead
        self._follows_call = False
        self._space = text[len(body) :]

    _follows_call = False

    def _begin_call(self, raw: str) -> None:
        self._call = CallScanner()
        self._raw = raw

    def _push_call(self, char: str) -> bool:
        """Follows a character of a call that is a JSON object; True when the call is over, for better or worse."""
        call = self._call
        assert call is not None, "no call has begun"
        was_known = call.name is not None
        self._raw += char
        call.push(char)
        if call.is_broken and not was_known:
            self._call, raw, self._raw = None, self._raw, ""
            self._say(raw)
            return True
        if call.name is not None:
            if not was_known:
                self._name_call(call.name)
            self._write_arguments(call.take_arguments())
        if call.is_done or call.is_broken:
            self._call = None
            self._end_call()
            return True
        return False

    def _name_call(self, name: str) -> None:
        self._space = ""
        self._has_arguments = False
        if self._max_calls is None or self._num_calls < self._max_calls:
            self._pieces.calls.append(CallPiece(self._num_calls, name=name))

    def _write_arguments(self, text: str) -> None:
        if text and (self._max_calls is None or self._num_calls < self._max_calls):
            self._has_arguments = True
            self._pieces.add_arguments(self._num_calls, text)

    _has_arguments = False

    def _end_call(self) -> None:
        if not self._has_arguments:
            self._write_arguments("{}")
        if self._max_calls is None or self._num_calls < self._max_calls:
            self._num_calls += 1
        self._raw = ""
        self._follows_call = True


class _MarkedParser(ToolParser):
    """Text until a mark; what follows the mark is the subclass's."""

    mark: str

    def __init__(self, max_calls: int | None = None) -> None:
        super().__init__(max_calls)
        self._held = ""  # may be the beginning of the mark

    def _seek(self, char: str) -> bool:
        """True when the mark is complete."""
        held = self._held + char
        while not self.mark.startswith(held):
            self._say(held[0])
            held = held[1:]
        self._held = "" if held == self.mark else held
        return held == self.mark

    def finish(self) -> Pieces:
        """See `ToolParser`."""
        if self._held and not self._num_calls:  # else it was to become one call more
            self._say(self._held)
        self._held = ""
        return super().finish()


class HermesParser(_MarkedParser):
    """`<tool_call> {...} </tool_call>`."""

    mark = "<tool_call>"
    _end_mark = "</tool_call>"
    _is_closing = False

    def _step(self, char: str) -> None:
        if self._call is not None:
            self._is_closing = self._push_call(char) and self._follows_call
            self._raw = self._raw if not self._is_closing else ""
        elif self._is_closing:
            self._close(char)
        elif self._seek(char):
            self._begin_call(self.mark)

    def _close(self, char: str) -> None:
        self._held += char
        seen = self._held.lstrip(_SPACE)
        if seen == self._end_mark:
            self._held = ""
            self._is_closing = False
        elif not self._end_mark.startswith(seen):  # it was left out
            held, self._held = self._held, ""
            self._is_closing = False
            for other in held:
                self._step(other)

    def finish(self) -> Pieces:
        """See `ToolParser`."""
        if self._is_closing:
            self._held = ""
        return super().finish()


class LlamaParser(ToolParser):
    """`{...}; {...}` from the very beginning, or text."""

    _mark = "<|python_tag|>"
    _is_text = False

    def _step(self, char: str) -> None:
        if self._is_text:
            self._say(char)
        elif self._call is not None:
            self._is_text = self._push_call(char) and not self._follows_call
        else:
            self._between(char)

    def _between(self, char: str) -> None:
        self._raw += char
        seen = self._raw.strip(_SPACE + (";," if self._num_calls else ""))
        if char == "{" and seen in ("{", self._mark + "{"):
            raw, self._raw = self._raw[:-1], ""
            self._begin_call(raw)
            self._push_call(char)
        elif not self._mark.startswith(seen):
            raw, self._raw = self._raw, ""
            self._is_text = True
            self._say(raw)

    def finish(self) -> Pieces:
        """See `ToolParser`."""
        if self._num_calls and not self._raw.strip(_SPACE + ";,"):
            self._raw = ""
        return super().finish()


class MistralParser(_MarkedParser):
    """`[TOOL_CALLS]`, then an array of calls, or a name and its arguments."""

    mark = "[TOOL_CALLS]"
    _array = False
    _head: str | None = None  # of a call, until its arguments begin
    _value: ValueScanner | None = None  # arguments of a call whose name was in the head

    def _step(self, char: str) -> None:
        if self._call is not None:
            self._array = not (self._push_call(char) and not self._follows_call)
        elif self._value is not None:
            self._push_value(self._value, char)
        elif self._array:
            self._between(char)
        elif self._head is not None:
            self._push_head(char)
        elif self._seek(char):
            self._head, self._raw = "", self.mark

    def _push_head(self, char: str) -> None:
        self._raw += char
        assert self._head is not None
        if char == "[" and not self._head.strip(_SPACE):
            self._head, self._array = None, True
        elif char == "{" and (name := self._head.partition("[")[0].strip(_SPACE)):
            self._head = None
            self._name_call(name)
            self._value = ValueScanner()
            self._push_value(self._value, char)
        else:
            self._head += char

    def _push_value(self, value: ValueScanner, char: str) -> None:
        value.push(char)
        self._write_arguments(char)
        if value.is_done:
            self._value = None
            self._end_call()

    def _between(self, char: str) -> None:
        if char == "{":
            raw, self._raw = self._raw, ""
            self._begin_call(raw)
            self._push_call(char)
        elif char == "]":
            self._array, self._raw = False, ""
            self._follows_call = True
        elif char not in _SPACE + ",":
            self._array = False
            self._raw, raw = "", self._raw
            self._say(raw + char)
        elif not self._num_calls:
            self._raw += char

    def finish(self) -> Pieces:
        """See `ToolParser`."""
        if self._value is not None:
            self._raw = ""
        return super().finish()


def tool_parser(family: ToolFamily, max_calls: int | None) -> ToolParser:
    """A parser for one choice."""
    return _PARSERS[family](max_calls)


_PARSERS: dict[ToolFamily, type[ToolParser]] = {
    ToolFamily.HERMES: HermesParser,
    ToolFamily.LLAMA3_JSON: LlamaParser,
    ToolFamily.MISTRAL: MistralParser,
}
