"""Asks the data plane for signs of life.

A wedged thread looks like silence, one that spins takes a core and never sleeps; only the process's end cures either.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

INTERVAL_S = 1.0
LATE_S = 2.0
"""Without an answer for so long the process is not ready."""
WEDGED_S = 10.0
"""Without an answer for so long it never will be."""
SPINNING_S = 5.0
"""A thread that has been awake for so long, which as a rule is asleep, will not sleep any more."""

_LOOK_S = 0.1


class WedgedDataPlane(Exception):
    """A thread of the data plane does not turn any more, or does nothing else."""


class DataPlaneWatch:
    """Owned by the event loop.

    Args:
        probe: Returns when the data plane has taken a turn.
        on_wedged: Called once, `wedged_s` after the first question that got no answer, or `spinning_s` after a thread
            slept last.
        awake_s: How long the data plane's own thread has not slept.
    """

    def __init__(
        self,
        probe: Callable[[], Awaitable[None]],
        on_wedged: Callable[[BaseException], None],
        awake_s: Callable[[], float] = lambda: 0.0,
        *,
        interval_s: float = INTERVAL_S,
        late_s: float = LATE_S,
        wedged_s: float = WEDGED_S,
        spinning_s: float = SPINNING_S,
    ) -> None:
        self._probe = probe
        self._on_wedged = on_wedged
        self._awake_s = awake_s
        self._interval_s = interval_s
        self._late_s = late_s
        self._wedged_s = wedged_s
        self._spinning_s = spinning_s
        self._silent_s = 0.0

    @property
    def reason(self) -> str:
        """Why the data plane is not ready; "" when it is."""
        if self._silent_s <= self._late_s:
            return ""
        return f"the data plane has not answered for {self._silent_s:.1f} s (limit {self._late_s:g} s)"

    async def run(self) -> None:
        """Asks until cancelled."""
        while True:
            answer = asyncio.ensure_future(self._probe())
            while not answer.done():
                await asyncio.wait({answer}, timeout=_LOOK_S)
                # Counted in looks, not in hours: while this process itself was stopped, nobody was silent.
                self._silent_s += _LOOK_S
                if self._silent_s > self._wedged_s:
                    self._on_wedged(WedgedDataPlane(self.reason))
                    return
            answer.result()
            self._silent_s = 0.0
            if (awake_s := self._awake_s()) > self._spinning_s:
                self._on_wedged(WedgedDataPlane(f"a thread of the data plane has not slept for {awake_s:.1f} s"))
                return
            await asyncio.sleep(self._interval_s)
