"""A circuit breaker: after a failure nobody tries for a while, so that a slow directory cannot slow the serving."""

from __future__ import annotations

import time
from collections.abc import Callable


class CircuitBreaker:
    """Open or closed, by the calls of its owner.

                   failed()
        closed ---------------> open for `open_s`
          ^                        |
          '-------- succeeded() ---'   (too early: ignored; a slow Redis answers now and then)

    While open, background work keeps probing and the callers on the request path are turned away without waiting.
    Not thread-safe: one event loop owns it.
    """

    def __init__(self, *, open_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._open_s = open_s
        self._clock = clock
        self._open_until: float | None = None

    @property
    def is_open(self) -> bool:
        """Callers on the request path should not try."""
        return self._open_until is not None

    def failed(self) -> bool:
        """Notes a failure; returns whether the breaker was closed."""
        was_closed = self._open_until is None
        self._open_until = self._clock() + self._open_s
        return was_closed

    def succeeded(self) -> bool:
        """Notes a success; returns whether it closed the breaker."""
        if self._open_until is None or self._clock() < self._open_until:
            return False
        self._open_until = None
        return True
