"""In which order sequences start, and which one yields when memory runs out."""

from __future__ import annotations

from typing import Protocol

from shared.engine.sequence import Sequence

OrderKey = tuple[float, ...]


class Policy(Protocol):
    """Orders sequences: the smaller key is the senior one. Keys are unique and taken when a sequence is queued."""

    def key(self, sequence: Sequence) -> OrderKey:
        """Compares as a tuple; ends in something unique."""
        ...


class FirstComeFirstServed:
    """By priority, then by arrival."""

    def key(self, sequence: Sequence) -> OrderKey:
        """`(priority, arrival, id)`."""
        return (sequence.priority, sequence.arrival_s, sequence.sequence_id)


class ShortestPrefillFirst:
    """By priority, then by how much has to be computed before the first token: lower mean time to first token.

    Long prompts are not starved: the waiting queue ages what is overtaken.
    """

    def key(self, sequence: Sequence) -> OrderKey:
        """`(priority, tokens to compute, arrival, id)`."""
        return (sequence.priority, sequence.num_uncomputed_tokens, sequence.arrival_s, sequence.sequence_id)


def preemption_cost(sequence: Sequence) -> OrderKey:
    """The sequence with the smallest cost yields first: least important, least often preempted, least to recompute.

    Earlier preemptions count before the tokens to recompute, so that no sequence is the cheapest one forever.
    """
    return (-sequence.priority, sequence.num_preemptions, sequence.num_computed_tokens, -sequence.arrival_s)
