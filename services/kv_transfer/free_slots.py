"""Slots of a file that hold nothing: those that may be written, and those that a full disk has no room for."""

from __future__ import annotations

from collections.abc import Iterable


class FreeSlots:
    """Owned by whoever writes the file.

    Args:
        slots: In the order in which they are to be taken.
    """

    def __init__(self, slots: Iterable[int] = ()) -> None:
        self._free = [*slots][::-1]
        self._without_room: list[int] = []

    def __len__(self) -> int:
        """Those that may be taken now."""
        return len(self._free)

    @property
    def num_without_room(self) -> int:
        """Those that were set aside."""
        return len(self._without_room)

    def take(self) -> int:
        """The next one; there must be one."""
        return self._free.pop()

    def give(self, slots: Iterable[int]) -> None:
        """These hold nothing any more."""
        self._free.extend(slots)

    def set_aside(self) -> None:
        """The disk is full: what is free is out of use until there is room for it."""
        self._without_room.extend(self._free)
        self._free.clear()

    def take_back(self, num_slots: int) -> None:
        """There is room again, for so many at most."""
        for _ in range(min(num_slots, len(self._without_room))):
            self._free.append(self._without_room.pop())
