"""Finds stop strings in text that arrives in pieces.

The result depends on the characters alone, never on how they were cut into tokens: the stop string that completes first
wins; of several that complete at one character, the longest.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Follows one choice's text; mutable, owned by that choice.

    Text that may still turn out to be the beginning of a stop string is held back. Cost is proportional to the text
    and the number of stop strings, not to their length (Knuth, Morris, Pratt, "Fast pattern matching in strings").

    Attributes:
        matched: The stop string that was found; None so far.
    """

    __slots__ = ("_failures", "_first_chars", "_held", "_states", "_stops", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._failures = [_failure_links(stop) for stop in stops]
        self._first_chars = {stop[0] for stop in stops}
        self._states = [0] * len(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Adds text; returns what may be shown: once `matched` is set, nothing but what precedes the stop string."""
        if not self._held and self._first_chars.isdisjoint(text):
            return text
        for position, char in enumerate(text):
            if stop := self._advance(char):
                self.matched = stop
                seen = self._held + text[: position + 1]
                self._held = ""
                return seen[: len(seen) - len(stop)]
        seen = self._held + text
        keep = max(self._states)
        self._held = seen[len(seen) - keep :]
        return seen[: len(seen) - keep]

    def flush(self) -> str:
        """The text held back, when no more will come."""
        held, self._held = self._held, ""
        self._states = [0] * len(self._stops)
        return held

    def _advance(self, char: str) -> str:
        """One character through every stop string's automaton; the stop string that it completes, or ""."""
        found = ""
        for i, stop in enumerate(self._stops):
            state = self._states[i]
            links = self._failures[i]
            while state and stop[state] != char:
                state = links[state - 1]
            if stop[state] == char:
                state += 1
            if state == len(stop):
                found = max(found, stop, key=len)
                state = 0
            self._states[i] = state
        return found


def _failure_links(stop: str) -> list[int]:
    """For each prefix, the length of its longest proper suffix that is also a prefix."""
    links = [0] * len(stop)
    length = 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = links[length - 1]
        if stop[i] == stop[length]:
            length += 1
        links[i] = length
    return links
