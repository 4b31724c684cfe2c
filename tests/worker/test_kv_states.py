"""A sequence's KV goes through its life as the table says: no way out of a fetch but its end."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shared.errors import InternalError
from shared.worker.kv_state import KV_TRANSITIONS, KvEvent, KvState, new_kv_life


def test_every_state_is_reached_and_released_is_the_only_end():
    reached, pending = {KvState.QUEUED}, [KvState.QUEUED]
    while pending:
        for following in KV_TRANSITIONS[pending.pop()].values():
            if following not in reached:
                reached.add(following)
                pending.append(following)
    assert reached == set(KvState) == set(KV_TRANSITIONS)
    assert [state for state, events in KV_TRANSITIONS.items() if not events] == [KvState.RELEASED]


def test_a_token_before_the_kv_was_acquired_is_a_defect():
    life = new_kv_life()
    life.apply(KvEvent.SEARCH)
    with pytest.raises(InternalError):
        life.apply(KvEvent.TOKEN)
    assert life.state is KvState.SEARCHING


class KvLives(RuleBasedStateMachine):
    """Slots that a transport may write, against what the state says."""

    def __init__(self) -> None:
        super().__init__()
        self.life = new_kv_life()
        self.is_written = False
        self.has_ended = False

    def allows(self, event: KvEvent) -> bool:
        return event in KV_TRANSITIONS[self.life.state]

    @precondition(lambda self: self.allows(KvEvent.SEARCH))
    @rule()
    def search(self):
        self.life.apply(KvEvent.SEARCH)

    @precondition(lambda self: self.allows(KvEvent.SHARE))
    @rule()
    def share(self):
        self.life.apply(KvEvent.SHARE)

    @precondition(lambda self: self.allows(KvEvent.FETCH))
    @rule()
    def fetch(self):
        assert not self.has_ended
        self.life.apply(KvEvent.FETCH)
        self.is_written = True

    @precondition(lambda self: self.is_written)
    @rule()
    def settle(self):
        self.life.apply(KvEvent.SETTLE)
        self.is_written = False

    @precondition(lambda self: self.allows(KvEvent.ACQUIRE))
    @rule()
    def acquire(self):
        self.life.apply(KvEvent.ACQUIRE)
        assert not self.is_written

    @precondition(lambda self: self.allows(KvEvent.TOKEN))
    @rule()
    def token(self):
        self.life.apply(KvEvent.TOKEN)

    @precondition(lambda self: not self.has_ended)
    @rule()
    def end(self):
        self.life.apply(KvEvent.END)
        self.has_ended = True

    @precondition(lambda self: self.life.is_final)
    @rule(event=st.sampled_from(KvEvent))
    def nothing_follows_the_end(self, event):
        with pytest.raises(InternalError):
            self.life.apply(event)

    @invariant()
    def nothing_is_released_while_it_may_be_written(self):
        assert self.is_written == (self.life.state in (KvState.FETCHING, KvState.SETTLING))
        assert self.life.is_final == (self.has_ended and not self.is_written)


TestKvLives = KvLives.TestCase
TestKvLives.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
