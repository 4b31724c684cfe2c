"""Whether blocks are cheaper fetched than computed, from what fetches and prefills took lately. Pure.

    fetch     latency + bytes / rate     per class of holder, fitted over recent fetches
    compute   tokens / prefill rate      as the engine measures it

What is not known, or was not seen for a while, is fetched: that is how it becomes known.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

MEMORY_S = 30.0
"""A class of holders that looked too slow is tried again after this long without a fetch."""
_DECAY = 0.9
_MIN_FETCHES = 3


class HolderClass(Enum):
    """Who is asked; within a class, fetches take about the same time per byte."""

    OWN_TIER = "own_tier"
    PEER = "peer"


@dataclass(slots=True)
class FetchSpeed:
    """A straight line through recent fetches, seconds over bytes; older ones count less.

    Attributes:
        count: Fetches seen.
        seen_s: When the last one was.
    """

    count: int = 0
    seen_s: float = 0.0
    _weight: float = 0.0
    _x: float = 0.0
    _y: float = 0.0
    _xx: float = 0.0
    _xy: float = 0.0

    def observe(self, num_bytes: int, seconds: float, now_s: float) -> None:
        """Takes one fetch into account."""
        self._weight = _DECAY * self._weight + 1
        self._x = _DECAY * self._x + num_bytes
        self._y = _DECAY * self._y + seconds
        self._xx = _DECAY * self._xx + num_bytes * num_bytes
        self._xy = _DECAY * self._xy + num_bytes * seconds
        self.count += 1
        self.seen_s = now_s

    def predict(self, num_bytes: int) -> float:
        """Seconds that a fetch of so many bytes takes; neither part of the line is let become negative."""
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - mean_x * mean_x
        slope = mean_y / mean_x if mean_x else 0.0
        if spread > 1e-6 * self._xx / self._weight:
            slope = min(max((self._xy / self._weight - mean_x * mean_y) / spread, 0.0), slope)
        else:  # all of one size: half of the time is laid to latency, which errs to neither side by more than two
            slope /= 2
        return mean_y + slope * (num_bytes - mean_x)


class FetchCosts:
    """What one worker learnt about fetching. Used on the event loop.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._speeds = {kind: FetchSpeed() for kind in HolderClass}

    def observe(self, kind: HolderClass, num_bytes: int, seconds: float) -> None:
        """A fetch brought so many bytes; one that brought none says nothing of cost."""
        if num_bytes > 0:
            self._speeds[kind].observe(num_bytes, seconds, self._clock())

    def is_worth_fetching(
        self, kind: HolderClass, *, num_bytes: int, num_tokens: int, prefill_tokens_per_s: float
    ) -> bool:
        """Whether bytes that stand for `num_tokens` tokens of prefill should be fetched.

        Args:
            kind: Of the holder.
            num_bytes: That would be moved.
            num_tokens: That would be computed instead.
            prefill_tokens_per_s: Measured; 0 = not known.
        """
        speed = self._speeds[kind]
        is_known = speed.count >= _MIN_FETCHES and self._clock() - speed.seen_s < MEMORY_S
        if not is_known or prefill_tokens_per_s <= 0:
            return True
        return speed.predict(num_bytes) <= num_tokens / prefill_tokens_per_s
