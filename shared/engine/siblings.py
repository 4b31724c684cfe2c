"""Choices of one session: the first computes the prompt, the others wait for it and share its blocks."""

from __future__ import annotations

from shared.engine.sequence import Sequence
from shared.identity import SessionId


class Siblings:
    """Unfinished sequences by session, in order of submission.

    The leader of a session is its first unfinished sequence. Siblings wait for leaders only, and a leader waits for
    nobody, so the waiting has no cycle. When a leader ends early, the next one leads.
    """

    def __init__(self) -> None:
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

    def leader_of(self, sequence: Sequence) -> Sequence | None:
        """Whose blocks this sequence may share; None if it leads itself."""
        leader = self._sessions[sequence.session_id][0]
        return None if leader is sequence else leader

    def must_wait(self, sequence: Sequence) -> bool:
        """The leader has yet to compute tokens that this sequence could share: all of the prompt but the last one."""
        leader = self.leader_of(sequence)
        if leader is None:
            return False
        num_shareable = min(leader.num_prompt_tokens, sequence.num_prompt_tokens) - 1
        return max(leader.num_computed_tokens, sequence.num_computed_tokens) < num_shareable
