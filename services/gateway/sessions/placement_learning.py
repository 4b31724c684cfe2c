"""What first tokens took beyond what the cost model knows of: calls, hand-over, shared cores. Learnt per mode."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from services.gateway.sessions.placement import Mode, Placement

WEIGHT = 0.1  # of the latest observation
MAX_OVERHEAD_S = 1.0
HALF_LIFE_S = 30.0
"""A mode that looked too dear is not used and so not observed; its overhead is forgotten, and it is tried again."""


class PlacementLearning:
    """One for the gateway, on its event loop.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._overhead_s: dict[Mode, float] = {}
        self._observed_s: dict[Mode, float] = {}

    def observe(self, placement: Placement, actual_s: float) -> None:
        """A session's first token came `actual_s` after it was submitted."""
        mode = placement.mode
        unexplained_s = actual_s - (placement.predicted_s - placement.overhead_s)
        unexplained_s = min(max(unexplained_s, 0.0), MAX_OVERHEAD_S)
        known_s = self._overhead_s.get(mode, unexplained_s)
        self._overhead_s[mode] = known_s + WEIGHT * (unexplained_s - known_s)
        self._observed_s[mode] = self._clock()

    def overheads(self) -> Mapping[Mode, float]:
        """Seconds by mode, as of now."""
        now_s = self._clock()
        return {
            mode: overhead_s * 0.5 ** ((now_s - self._observed_s[mode]) / HALF_LIFE_S)
            for mode, overhead_s in self._overhead_s.items()
        }
