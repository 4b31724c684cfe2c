"""From a choice's text to answer, reasoning and tool calls."""

from __future__ import annotations

from dataclasses import dataclass

from services.gateway.syntax.families import ReasoningMarks, ToolFamily
from services.gateway.syntax.pieces import Pieces
from services.gateway.syntax.reasoning_parser import ReasoningParser
from services.gateway.syntax.tool_parsers import tool_parser


@dataclass(frozen=True, slots=True)
class ReplySyntax:
    """How the replies to one request are read; what is None is left in the text.

    Attributes:
        is_thinking: The prompt ends inside of reasoning.
        max_calls: None = no limit.
        is_named_call: The client named the one function that is called.
        shows_reasoning: False drops it.
    """

    tools: ToolFamily | None = None
    reasoning: ReasoningMarks | None = None
    is_thinking: bool = False
    max_calls: int | None = None
    is_named_call: bool = False
    shows_reasoning: bool = True

    @property
    def marks(self) -> tuple[str, ...]:
        """What must be seen even where it is a special token."""
        tools = self.tools.marks if self.tools else ()
        return (*tools, self.reasoning.start, self.reasoning.end) if self.reasoning else tools


class ReplyParser:
    """Follows one choice; mutable."""

    def __init__(self, syntax: ReplySyntax) -> None:
        self._syntax = syntax
        self._reasoning = (
            ReasoningParser(syntax.reasoning, is_open=syntax.is_thinking) if syntax.reasoning is not None else None
        )
        self._tools = tool_parser(syntax.tools, syntax.max_calls) if syntax.tools is not None else None

    @property
    def has_calls(self) -> bool:
        """At least one tool was called."""
        return self._tools is not None and self._tools.num_calls > 0

    def push(self, text: str) -> Pieces:
        """What became known with more text."""
        pieces = self._reasoning.push(text) if self._reasoning is not None else Pieces(text)
        return self._with_calls(pieces)

    def finish(self) -> Pieces:
        """What is left at the end."""
        pieces = self._with_calls(self._reasoning.finish() if self._reasoning is not None else Pieces())
        if self._tools is not None:
            last = self._tools.finish()
            pieces.text += last.text
            pieces.calls += last.calls
        return pieces

    def _with_calls(self, pieces: Pieces) -> Pieces:
        if not self._syntax.shows_reasoning:
            pieces.reasoning = ""
        if self._tools is not None and pieces.text:
            found = self._tools.push(pieces.text)
            pieces.text, pieces.calls = found.text, found.calls
        return pieces
