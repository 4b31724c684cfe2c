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
local id = redis.call('HGET', KEYS[1], 'id')
local used = tonumber(redis.call('HGET', KEYS[1], 'used') or '0')
local amount, limit, window = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local counts = (limit < 0 or used + amount <= limit) and (window == '' or window == id)
if counts and amount ~= 0 then
  if not id then
    id = ARGV[5]
    redis.call('HSET', KEYS[1], 'id', id)
    redis.call('PEXPIRE', KEYS[1], ARGV[4])
  end
  used = redis.call('HINCRBY', KEYS[1], 'used', amount)
end
return {counts and 1 or 0, used, redis.call('PTTL', KEYS[1]), id or ''}
"""


@dataclass(frozen=True, slots=True)
class Count:
    """What came of counting.

    Attributes:
        is_counted: False where the amount did not fit, or the window that was meant is over.
        used: Of the window, with the amount if it was counted.
        left_s: Until the window ends; of one that has not begun, all of it.
        window: Names it; "" = it has not begun.
    """

    is_counted: bool
    used: int
    left_s: float
    window: str


class Counters(Protocol):
    """Windows by name."""

    async def count(self, name: str, amount: int, window_s: float, *, limit: int = -1, window: str = "") -> Count:
        """Counts an amount, unless the limit does not allow it or the window that is meant is over.

        Args:
            name: Of the counter.
            amount: 0 only looks; below 0 gives back.
            window_s: How long a window that begins now lasts.
            limit: Of the window; -1 = none.
            window: The one that is meant; "" = whichever it is now.

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

    async def count(self, name: str, amount: int, window_s: float, *, limit: int = -1, window: str = "") -> Count:
        """See `Counters`."""
        arguments = (amount, limit, window, int(window_s * 1000), secrets.token_hex(8))
        try:
            [(counted, used, left_ms, found)] = await self._redis.run([("EVAL", _COUNT, 1, name, *arguments)])
        except StoreDown as exc:
            raise Unavailable(f"rate limits are out of reach: Redis does not answer ({exc})"[:300]) from exc
        left_s = left_ms / 1000 if left_ms > 0 else window_s
        return Count(bool(counted), used, left_s, found.decode())


@dataclass(slots=True)
class _Window:
    name: str
    ends_s: float
    used: int = 0


class MemoryCounters:
    """Of this process alone."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._windows: dict[str, _Window] = {}

    async def count(self, name: str, amount: int, window_s: float, *, limit: int = -1, window: str = "") -> Count:
        """See `Counters`. Nothing is awaited, so this is one step too."""
        now_s, current = self._clock(), self._windows.get(name)
        if current is not None and current.ends_s <= now_s:
            del self._windows[name]
            current = None
        used, found = (current.used, current.name) if current is not None else (0, "")
        is_counted = (limit < 0 or used + amount <= limit) and window in ("", found)
        if is_counted and amount:
            if current is None:
                current = self._windows[name] = _Window(secrets.token_hex(8), now_s + window_s)
            current.used += amount
        if current is None:
            return Count(is_counted, 0, window_s, "")
        return Count(is_counted, current.used, current.ends_s - now_s, current.name)
