"""Whatever happens in whatever order, a session goes through its life as the table says, and ends exactly once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.gateway.sessions.session import Finish, FinishReason, Mailbox, Session
from services.gateway.sessions.session_state import SESSION_TRANSITIONS, SessionEvent, SessionState
from shared.engine.sampling_params import SamplingParams
from shared.errors import InternalError, WorkerDraining, WorkerLost
from shared.identity import pack_tokens
from shared.state_machine import StateMachine

FINAL = {SessionState.FINISHED, SessionState.FAILED, SessionState.CANCELLED}
PLACEMENT = SimpleNamespace(holders=(), decode=SimpleNamespace(worker_id="w", block_size=16))


def test_every_state_is_reached_and_only_ends_are_final():
    reached, pending = {SessionState.NEW}, [SessionState.NEW]
    while pending:
        for following in SESSION_TRANSITIONS[pending.pop()].values():
            if following not in reached:
                reached.add(following)
                pending.append(following)
    assert reached == set(SessionState) == set(SESSION_TRANSITIONS)
    assert {state for state, events in SESSION_TRANSITIONS.items() if not events} == FINAL


def test_what_the_table_does_not_allow_is_a_defect_and_changes_nothing():
    life = StateMachine(SESSION_TRANSITIONS, SessionState.NEW)
    with pytest.raises(InternalError, match=r"TOKEN.*NEW"):
        life.apply(SessionEvent.TOKEN)
    assert life.state is SessionState.NEW


class SessionLife(RuleBasedStateMachine):
    """A session between a gateway and workers that do what they like."""

    def __init__(self) -> None:
        super().__init__()
        self.session = Session(pack_tokens([1, 2]), SamplingParams(max_tokens=50), 3, Mailbox())
        self.sent: list[list[int]] = [[], [], []]
        self.taken: list[list[int]] = [[], [], []]
        self.ends = 0

    def at_worker(self) -> bool:
        return self.session.state in (SessionState.SUBMITTED, SessionState.STREAMING)

    @precondition(lambda self: self.session.state in (SessionState.NEW, SessionState.LOST))
    @rule()
    def place(self):
        self.session.begin_placing()

    @precondition(lambda self: self.session.state is SessionState.PLACING)
    @rule()
    def submit(self):
        before = self.session.attempt_id, self.session.attempts
        self.session.begin_attempt(PLACEMENT)
        assert self.session.attempts == before[1] + 1
        assert before[1] == 0 or self.session.attempt_id != before[0]

    @precondition(lambda self: self.at_worker())
    @rule(choice=st.integers(0, 2), token=st.integers(0, 99))
    def token(self, choice, token):
        if self.session.choices[choice].finish is None:
            self.session.choices[choice].push(token)
            self.sent[choice].append(token)
            assert self.session.state is SessionState.STREAMING

    @rule(choice=st.integers(0, 2))
    def take(self, choice):
        self.taken[choice] += self.session.choices[choice].take()[0]

    @precondition(lambda self: self.at_worker() or self.session.state is SessionState.LOST)
    @rule(choice=st.integers(0, 2), reason=st.sampled_from(FinishReason))
    def end_choice(self, choice, reason):
        first = self.session.choices[choice].finish
        self.session.choices[choice].end(Finish(reason))
        self.session.note_choice_ended()
        assert first is None or self.session.choices[choice].finish is first

    @precondition(lambda self: self.at_worker() or self.session.is_over)
    @rule(error=st.sampled_from([WorkerLost("gone"), WorkerDraining("draining")]))
    def lose(self, error):
        was_over, losses = self.session.is_over, len(self.session.losses)
        self.session.lose(error)
        assert len(self.session.losses) == losses + (not was_over)

    @precondition(lambda self: not self.session.is_over)
    @rule()
    def fail(self):
        self.session.fail(WorkerLost("nobody else"))

    @rule()
    def client_leaves(self):
        state, was_over = self.session.state, self.session.is_over
        self.session.cancel()
        assert self.session.state is (state if was_over else SessionState.CANCELLED)

    @invariant()
    def no_token_is_lost_or_doubled(self):
        for choice, sent, taken in zip(self.session.choices, self.sent, self.taken, strict=True):
            assert choice.token_ids == sent
            assert taken == sent[: len(taken)]

    @invariant()
    def over_means_over(self):
        assert self.session.is_over == (self.session.state in FINAL)
        if self.session.state is SessionState.FINISHED:
            assert not self.session.unfinished_choices


TestSessionLife = SessionLife.TestCase
TestSessionLife.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
