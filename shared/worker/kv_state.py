"""The life of one sequence's KV on a worker, as the event loop drives it.

             SEARCH             FETCH
     QUEUED --------> SEARCHING ------> FETCHING          a transport may write the slots reserved for it
       |                |   ^------------' |   SETTLE     each of those slots was committed, freed or quarantined
       |SHARE    ACQUIRE|                  |
       |                v                  |END
       '----------> ACQUIRED               v
                        |TOKEN          SETTLING          ended, but slots may still be written
                        v                  |SETTLE
                    GENERATING             v
                        '-----END-----> RELEASED          holds nothing

    QUEUED, SEARCHING, ACQUIRED --END--> RELEASED

Cancel is not quiescence: the only way out of FETCHING and SETTLING to RELEASED is SETTLE.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from shared.state_machine import StateMachine


class KvState(Enum):
    """Where a sequence's KV stands."""

    QUEUED = "queued"
    SEARCHING = "searching"
    FETCHING = "fetching"
    ACQUIRED = "acquired"
    GENERATING = "generating"
    SETTLING = "settling"
    RELEASED = "released"


class KvEvent(Enum):
    """What happens to it."""

    SEARCH = "search"  # own cache, holders, prefill workers
    SHARE = "share"  # it waits in the scheduler for a sibling's blocks and looks for none itself
    FETCH = "fetch"
    SETTLE = "settle"
    ACQUIRE = "acquire"  # what could be had is there; the engine computes the rest
    TOKEN = "token"  # the first one
    END = "end"  # finished, aborted, timed out or handed back


_S, _E = KvState, KvEvent

KV_TRANSITIONS: Mapping[KvState, Mapping[KvEvent, KvState]] = {
    _S.QUEUED: {_E.SEARCH: _S.SEARCHING, _E.SHARE: _S.ACQUIRED, _E.END: _S.RELEASED},
    _S.SEARCHING: {_E.FETCH: _S.FETCHING, _E.ACQUIRE: _S.ACQUIRED, _E.END: _S.RELEASED},
    _S.FETCHING: {_E.SETTLE: _S.SEARCHING, _E.END: _S.SETTLING},
    _S.ACQUIRED: {_E.TOKEN: _S.GENERATING, _E.END: _S.RELEASED},
    _S.GENERATING: {_E.END: _S.RELEASED},
    _S.SETTLING: {_E.SETTLE: _S.RELEASED},
    _S.RELEASED: {},
}

KvLife = StateMachine[KvState, KvEvent]


def new_kv_life() -> KvLife:
    """Of a sequence that was just submitted."""
    return StateMachine(KV_TRANSITIONS, KvState.QUEUED)
