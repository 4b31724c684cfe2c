"""Choices of one session: the first computes the prompt, the others wait for its blocks and share them."""

from __future__ import annotations

from shared.engine.sequence import Sequence
from shared.identity import SessionId


class Siblings:
    """Unfinished sequences by session, in order of submission.

    The leader of a session is its first unfinished sequence. Siblings wait for leaders only, and a leader waits for
    nobody, so the waiting has no cycle. When a leader ends early, the next one leads.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._sessions: dict[SessionId, list[Sequence]] = {}

    def add(self, sequence: Sequence) -> None:
        """Registers a submitted sequence."""
        self._sessions.setdefault(sequence.session_id, []).append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a finished sequence."""
        family = self._sessions[sequence.session_id]
        family.remove(sequence)
        if not family:
            del self._sessions[sequence.session_id]

    def must_wait(self, sequence: Sequence) -> bool:
        """The leader has yet to seal blocks that this sequence could use."""
        leader = self._sessions[sequence.session_id][0]
        if leader is sequence:
            return False
        num_shareable = (min(leader.num_prompt_tokens, sequence.num_prompt_tokens) - 1) // self._block_size
        return max(leader.num_sealed_blocks, sequence.num_sealed_blocks) < num_shareable
