"""States that change only as a table says.

The table is the specification: who reads it knows every way through a life, and what it does not allow is a defect
that shows itself at once. Idea: h11's transition tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Generic, TypeVar

from shared.errors import InternalError

S = TypeVar("S", bound=Enum)
E = TypeVar("E", bound=Enum)


class StateMachine(Generic[S, E]):
    """One life. Mutable; its owner alone applies events.

    Args:
        table: Per state the events that may happen in it, and the state that follows. A state without any is final.
    """

    __slots__ = ("_table", "state")

    def __init__(self, table: Mapping[S, Mapping[E, S]], initial: S) -> None:
        self._table = table
        self.state = initial

    @property
    def is_final(self) -> bool:
        """Nothing can happen any more."""
        return not self._table[self.state]

    def apply(self, event: E) -> None:
        """Something happened.

        Raises:
            InternalError: It cannot happen in this state; the state stays.
        """
        following = self._table[self.state].get(event)
        if following is None:
            raise InternalError(f"{event!r} cannot happen in {self.state!r}")
        self.state = following
