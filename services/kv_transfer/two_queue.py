"""Which block goes first when room is needed: recency and frequency, so that a scan flushes nothing that is in use.

The 2Q scheme (Johnson and Shasha, VLDB 1994) with least-recently-used order in both queues:

    add --------------> NEW ---- touched again ----> FREQUENT
                         | evicted first                | only when few are new
                         v                              v
    add of a remembered  REMEMBERED (names only)       gone
    name: FREQUENT <-----'

A one-off prompt's blocks pass through NEW and push out other newcomers only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K")

_NEW_SHARE = 4  # a quarter of the room is for newcomers, as in the paper


class TwoQueue(Generic[K]):
    """Keys in order of worth. Every operation is O(1), `evict` apart from keys that it has to skip.

    Args:
        capacity: Keys that there is room for; whoever uses this keeps within it by calling `evict`.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._new: OrderedDict[K, None] = OrderedDict()  # least recently used first, as all three
        self._frequent: OrderedDict[K, None] = OrderedDict()
        self._remembered: OrderedDict[K, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._new) + len(self._frequent)

    def __iter__(self) -> Iterator[K]:
        """Newcomers, then frequent ones, each least recently used first."""
        yield from self._new
        yield from self._frequent

    def add(self, key: K) -> None:
        """Takes in a key that is not here."""
        if key in self._remembered:
            del self._remembered[key]
            self._frequent[key] = None
        else:
            self._new[key] = None

    def touch(self, key: K) -> None:
        """The key was used."""
        self._new.pop(key, None)
        self._frequent[key] = None
        self._frequent.move_to_end(key)

    def remove(self, key: K) -> None:
        """Takes a key out, without remembering it."""
        if key in self._new:
            del self._new[key]
        else:
            del self._frequent[key]

    def evict(self, may_go: Callable[[K], bool]) -> K | None:
        """Takes out the least worthy key that may go; None if there is none."""
        queues = [self._new, self._frequent]
        if len(self._new) * _NEW_SHARE <= self.capacity:
            queues.reverse()
        for queue in queues:
            for key in queue:
                if may_go(key):
                    del queue[key]
                    if queue is self._new:
                        self._remember(key)
                    return key
        return None

    def _remember(self, key: K) -> None:
        self._remembered[key] = None
        if len(self._remembered) > self.capacity:
            self._remembered.popitem(last=False)
