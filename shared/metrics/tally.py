"""A histogram for what happens at every token."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

from prometheus_client import Histogram

FLUSH_EVERY_S = 1.0


class Tally:
    """Counts in plain numbers, and tells a Prometheus histogram about once a second: a bisection instead of two locks.

    Owned by one thread. What was not told yet is missing from scrapes: whoever is scraped flushes first, and where
    several processes share one page the others lag by at most `FLUSH_EVERY_S` while they observe anything.

    Args:
        histogram: With its labels.
        bounds: Its bucket borders, ascending.
    """

    def __init__(self, histogram: Histogram, bounds: Sequence[float]) -> None:
        self._histogram = histogram
        self._bounds = [*bounds, math.inf]
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0
        self._due_s = 0.0

    def observe(self, value: float, now_s: float) -> None:
        """One more value.

        Args:
            value: Counts in the first bucket whose border is not below it.
            now_s: `time.monotonic()`.
        """
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value
        if now_s >= self._due_s:
            self._due_s = now_s + FLUSH_EVERY_S
            self.flush()

    def flush(self) -> None:
        """Tells the histogram all that it was not told yet."""
        # The library has no way in for many values at once; these two are what its own `observe` adds to.
        for bucket, count in zip(self._histogram._buckets, self._counts, strict=True):
            if count:
                bucket.inc(count)
        self._histogram._sum.inc(self._sum)
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0
