"""Tells reasoning from the answer while text arrives, character by character; white space between them is dropped."""

from __future__ import annotations

from services.gateway.syntax.families import ReasoningMarks
from services.gateway.syntax.pieces import Pieces

_SPACE = " \t\r\n"


class ReasoningParser:
    """Follows one choice's text; mutable. The answer is `Pieces.text`.

    Args:
        marks: Of the model.
        is_open: The prompt ends inside of reasoning.
    """

    def __init__(self, marks: ReasoningMarks, *, is_open: bool) -> None:
        self._marks = marks
        self._begins_open = is_open or marks.is_implied
        self._has_begun = False  # it is clear what the output begins with
        self._is_open = False
        self._held = ""  # may be the beginning of a mark
        self._space = ""  # dropped if a mark or nothing follows
        self._is_at_border = True
        self._pieces = Pieces()

    def push(self, text: str) -> Pieces:
        """What became known with more text."""
        for position, char in enumerate(text):
            if self._has_begun and not self._is_open:
                self._answer(text[position:])
                break
            self._step(char)
        return self._take()

    def finish(self) -> Pieces:
        """What is left at the end."""
        held, self._held = self._held, ""
        if not self._has_begun:
            self._begin(is_open=self._begins_open)
        if self._is_open:
            self._think(held)
        else:
            self._answer(held)
        return self._take()

    def _step(self, char: str) -> None:
        if self._has_begun:
            self._step_inside(char)
            return
        self._held += char
        seen = self._held.lstrip(_SPACE)
        if seen == self._marks.start:
            self._held = ""
            self._begin(is_open=True)
        elif not self._marks.start.startswith(seen):
            held, self._held = self._held, ""
            self._begin(is_open=self._begins_open)
            for other in held:
                if self._is_open:
                    self._step_inside(other)
                else:
                    self._answer(other)

    def _begin(self, *, is_open: bool) -> None:
        self._has_begun = True
        self._is_open = is_open
        self._is_at_border = is_open

    def _step_inside(self, char: str) -> None:
        held = self._held + char
        while not self._marks.end.startswith(held):
            self._think(held[0])
            held = held[1:]
        self._held = held
        if held == self._marks.end:
            self._held = self._space = ""
            self._is_open = False
            self._is_at_border = True

    def _think(self, text: str) -> None:
        body = text.rstrip(_SPACE)
        if body:
            lead = self._space + body
            self._pieces.reasoning += lead.lstrip(_SPACE) if self._is_at_border else lead
            self._is_at_border = False
            self._space = ""
        self._space += text[len(body) :]

    def _answer(self, text: str) -> None:
        if self._is_at_border:
            text = text.lstrip(_SPACE)
            self._is_at_border = not text
        self._pieces.text += text

    def _take(self) -> Pieces:
        taken, self._pieces = self._pieces, Pieces()
        return taken
