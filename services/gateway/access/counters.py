"""Counters of fixed windows, which begin with what is counted first: in Redis for all gateways, or in this process.

A count is one step, so that simultaneous ones never go beyond a limit together.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from shared.directory.store import RedisStore, StoreDown
from shared.errors import Unavailable

TIMEOUT_S = 0.5

_COUNT = b"""
local function asked(i)
  local first = 2 + 4 * (i - 1)
  return tonumber(ARGV[first]), tonumber(ARGV[first + 1]), ARGV[first + 2], ARGV[first + 3]
end
local counts, all_fit = {}, true
for i, key in ipairs(KEYS) do
  local amount, limit, window = asked(i)
  local id, used = redis.call('HGET', key, 'id'), tonumber(redis.call('HGET', key, 'used') or '0')
  local fits = (limit < 0 or used + amount <= limit) and (window == '' or window == id)
  counts[i] = {fits and 1 or 0, used, 0, id or ''}
  all_fit = all_fit and fits
end
for i, key in ipairs(KEYS) do
  local amount, _, _, lasts = asked(i)
  if all_fit and amount ~= 0 then
    if counts[i][4] == '' then
      counts[i][4] = ARGV[1]
      redis.call('HSET', key, 'id', ARGV[1])
      redis.call('PEXPIRE', key, lasts)
    end
    counts[i][2] = redis.call('HINCRBY', key, 'used', amount)
  end
  counts[i][3] = redis.call('PTTL', key)
end
return counts
"""


@dataclass(frozen=True, slots=True)
class Amount:
    """To be counted.

    Attributes:
        name: Of the counter.
        amount: 0 only looks; below 0 gives back.
        window_s: How long a window that begins now lasts.
        limit: Of the window; -1 = none.
        window: The one that is meant; "" = whichever it is now.
    """

    name: str
    amount: int
    window_s: float
    limit: int = -1
    window: str = ""


@dataclass(frozen=True, slots=True)
class Count:
    """What came of counting.

    Attributes:
        fits: False where the amount does not fit, or the window that was meant is over.
        used: Of the window, with the amount if it was counted.
        left_s: Until the window ends; of one that has not begun, all of it.
        window: Names it; "" = it has not begun.
    """

    fits: bool
    used: int
    left_s: float
    window: str


class Counters(Protocol):
    """Windows by name."""

    async def count(self, *amounts: Amount) -> list[Count]:
        """Counts amounts in one step: all of them if all fit, else none.

        Args:
            amounts: On a cluster, the part of their names in braces is one and the same.

        Raises:
            Unavailable: The counters are out of reach.
        """
        ...


class RedisCounters:
    """Shared by all gateways of a Redis."""

    def __init__(self, redis_url: str) -> None:
        self._redis = RedisStore(redis_url, lookup_timeout_s=TIMEOUT_S, background_timeout_s=TIMEOUT_S)

    async def close(self) -> None:
        """Closes the connections."""
        await self._redis.close()

    async def count(self, *amounts: Amount) -> list[Count]:
        """See `Counters`."""
        names = [one.name for one in amounts]
        asked = [(one.amount, one.limit, one.window, int(one.window_s * 1000)) for one in amounts]
        command = ("EVAL", _COUNT, len(names), *names, secrets.token_hex(8), *(part for one in asked for part in one))
        try:
            [counts] = await self._redis.run([command])
        except StoreDown as exc:
            raise Unavailable(f"rate limits are out of reach: Redis does not answer ({exc})"[:300]) from exc
        return [
            Count(bool(fits), used, left_ms / 1000 if left_ms > 0 else one.window_s, found.decode())
            for one, (fits, used, left_ms, found) in zip(amounts, counts, strict=True)
        ]


@dataclass(slots=True)
class _Window:
    name: str = ""
    ends_s: float = 0.0
    used: int = 0


class MemoryCounters:
    """Of this process alone."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._windows: dict[str, _Window] = {}

    async def count(self, *amounts: Amount) -> list[Count]:
        """See `Counters`. Nothing is awaited, so this is one step too."""
        now_s = self._clock()
        windows = [self._window(one.name, now_s) for one in amounts]
        fits = [
            (one.limit < 0 or window.used + one.amount <= one.limit) and one.window in ("", window.name)
            for one, window in zip(amounts, windows, strict=True)
        ]
        if all(fits):
            for one, window in zip(amounts, windows, strict=True):
                if one.amount:
                    if not window.name:
                        window.name, window.ends_s = secrets.token_hex(8), now_s + one.window_s
                        self._windows[one.name] = window
                    window.used += one.amount
        return [
            Count(is_fit, window.used, window.ends_s - now_s if window.name else one.window_s, window.name)
            for one, window, is_fit in zip(amounts, windows, fits, strict=True)
        ]

    def _window(self, name: str, now_s: float) -> _Window:
        """The current one; nameless if none has begun."""
        current = self._windows.get(name)
        if current is not None and current.ends_s <= now_s:
            del self._windows[name]
            current = None
        return current or _Window()
