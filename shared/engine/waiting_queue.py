"""Sequences that are ready to run but do not run yet, in the policy's order, with aging."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

from shared.engine.policy import OrderKey, Policy
from shared.engine.sequence import Sequence
from shared.identity import SequenceId


@dataclass(slots=True)
class Waiting:
    """One queued sequence.

    Attributes:
        key: Position in the queue; an aged entry's key is smaller than any other's.
        num_overtakes: How many sequences that arrived later were admitted meanwhile.
    """

    sequence: Sequence
    key: OrderKey
    num_overtakes: int = 0
    is_aged: bool = False


class WaitingQueue:
    """Sorted by seniority. Whatever the policy, a sequence overtaken `max_overtakes` times moves to the front.

    The scheduler lets nothing pass an aged sequence, so every one starts after finitely many others.
    """

    def __init__(self, policy: Policy, max_overtakes: int) -> None:
        self._policy = policy
        self._max_overtakes = max_overtakes
        self._entries: dict[SequenceId, Waiting] = {}
        self._order: list[Waiting] = []

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._order)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.sequence_id in self._entries

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence where the policy puts it."""
        entry = Waiting(sequence, key=self.seniority(sequence))
        self._entries[sequence.sequence_id] = entry
        insort(self._order, entry, key=_key)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, because it ended."""
        entry = self._entries.pop(sequence.sequence_id)
        del self._order[bisect_left(self._order, entry.key, key=_key)]

    def admit(self, sequence: Sequence) -> None:
        """Takes a sequence out, because it starts to run; those that came before it are one overtake older."""
        self.remove(sequence)
        overtaken = [e for e in self._order if e.sequence.arrival_s < sequence.arrival_s]
        for entry in overtaken:
            entry.num_overtakes += 1
            if entry.num_overtakes == self._max_overtakes:
                self._age(entry)

    def seniority(self, sequence: Sequence) -> OrderKey:
        """Smaller is more senior; comparable between sequences in and out of the queue."""
        entry = self._entries.get(sequence.sequence_id)
        return entry.key if entry else (1, *self._policy.key(sequence))

    @property
    def aged_head(self) -> Waiting | None:
        """The most senior sequence, if it is one that nobody may pass."""
        return self._order[0] if self._order and self._order[0].is_aged else None

    def _age(self, entry: Waiting) -> None:
        del self._order[bisect_left(self._order, entry.key, key=_key)]
        entry.is_aged = True
        entry.key = (0, *entry.key[1:])
        insort(self._order, entry, key=_key)


def _key(entry: Waiting) -> OrderKey:
    return entry.key
