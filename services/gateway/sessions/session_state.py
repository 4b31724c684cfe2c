"""The life of a session at the gateway.

              PLACE            SUBMIT               TOKEN
         NEW -------> PLACING --------> SUBMITTED --------> STREAMING
                         ^                  |                   |
                         |                  |LOSE           LOSE|
                         '------ LOST <-----'-------------------'
                           PLACE   |
                                   |FINISH: only last words were missing

SUBMITTED, STREAMING, LOST --FINISH--> FINISHED     every choice has ended
all but the final ones     --FAIL----> FAILED       its client gets the error
all but the final ones     --CANCEL--> CANCELLED    its client left, or a sibling session failed
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class SessionState(Enum):
    """Where a session stands."""

    NEW = "new"
    PLACING = "placing"
    SUBMITTED = "submitted"
    STREAMING = "streaming"
    LOST = "lost"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


class SessionEvent(Enum):
    """What happens to it."""

    PLACE = "place"  # a worker is being looked for
    SUBMIT = "submit"  # one was found and asked
    TOKEN = "token"  # the first one since
    LOSE = "lose"  # the worker, or the way to it, gave the session up
    FINISH = "finish"
    FAIL = "fail"
    CANCEL = "cancel"


_S, _E = SessionState, SessionEvent
_ENDS = {_E.FAIL: _S.FAILED, _E.CANCEL: _S.CANCELLED}

SESSION_TRANSITIONS: Mapping[SessionState, Mapping[SessionEvent, SessionState]] = {
    _S.NEW: {_E.PLACE: _S.PLACING, **_ENDS},
    _S.PLACING: {_E.SUBMIT: _S.SUBMITTED, **_ENDS},
    _S.SUBMITTED: {_E.TOKEN: _S.STREAMING, _E.LOSE: _S.LOST, _E.FINISH: _S.FINISHED, **_ENDS},
    _S.STREAMING: {_E.LOSE: _S.LOST, _E.FINISH: _S.FINISHED, **_ENDS},
    _S.LOST: {_E.PLACE: _S.PLACING, _E.FINISH: _S.FINISHED, **_ENDS},
    _S.FINISHED: {},
    _S.FAILED: {},
    _S.CANCELLED: {},
}
