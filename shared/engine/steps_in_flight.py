"""Which sequences belong to steps that the runner has and the scheduler has not taken back."""

from __future__ import annotations

from collections.abc import Iterable

from shared.engine.sequence import Sequence
from shared.engine.step import ScheduledSequence
from shared.identity import SequenceId


class StepsInFlight:
    """Keeps the blocks of a sequence its own while any step may read or write them. Owned by the scheduler.

    A sequence may end by the outcome of one step while the next, already under way, computes a token for it that nobody
    wants: it is then `leaving` until that step is over.
    """

    def __init__(self) -> None:
        self._steps: dict[SequenceId, int] = {}
        self._aborted: set[SequenceId] = set()
        self._leaving: dict[SequenceId, Sequence] = {}

    def __bool__(self) -> bool:
        return bool(self._steps)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.sequence_id in self._steps

    @property
    def leaving(self) -> list[Sequence]:
        """Ended sequences that still hold blocks."""
        return list(self._leaving.values())

    def begin(self, scheduled: Iterable[ScheduledSequence]) -> None:
        """A step with these sequences is handed to the runner."""
        steps = self._steps
        for entry in scheduled:
            sequence_id = entry.sequence.sequence_id
            steps[sequence_id] = steps.get(sequence_id, 0) + 1

    def end(self, sequence: Sequence) -> bool:
        """One step of the sequence is over; True if the sequence is to be aborted."""
        sequence_id = sequence.sequence_id
        left = self._steps.pop(sequence_id) - 1
        if left:
            self._steps[sequence_id] = left
        if sequence_id not in self._aborted:
            return False
        self._aborted.remove(sequence_id)
        return True

    def abort(self, sequence: Sequence) -> bool:
        """Notes that the sequence is to end with its oldest step; False if it is in none."""
        if sequence not in self:
            return False
        self._aborted.add(sequence.sequence_id)
        return True

    @property
    def are_unwanted(self) -> bool:
        """Every sequence that is in a step is to be aborted, and there are some."""
        return bool(self._aborted) and len(self._aborted) == len(self._steps)

    def leave(self, sequence: Sequence) -> bool:
        """The sequence ended; True if its blocks must stay for a step, until `has_left`."""
        if sequence not in self:
            return False
        self._leaving[sequence.sequence_id] = sequence
        return True

    def has_left(self, sequence: Sequence) -> bool:
        """True once: when no step has the ended sequence any more."""
        return sequence not in self and self._leaving.pop(sequence.sequence_id, None) is not None

    def clear(self) -> list[Sequence]:
        """Forgets everything, because no step will end; returns the sequences that were leaving."""
        leaving = self.leaving
        self._steps.clear()
        self._aborted.clear()
        self._leaving.clear()
        return leaving
