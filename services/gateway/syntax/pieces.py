"""What parsing a reply yields."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class CallPiece:
    """More of a tool call.

    Attributes:
        index: Of the call in its choice.
        name: With the first piece of a call, which has no arguments; else None.
        arguments: The next part of its arguments, JSON.
    """

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class Pieces:
    """What became known of a reply; mutable while it is put together."""

    text: str = ""
    reasoning: str = ""
    calls: list[CallPiece] = field(default_factory=list)

    def add_arguments(self, index: int, text: str) -> None:
        """Appends to a call, without a piece per character."""
        if self.calls and self.calls[-1].index == index and self.calls[-1].name is None:
            text = self.calls.pop().arguments + text
        self.calls.append(CallPiece(index, arguments=text))
