"""Requests and tokens per minute, counted for a tenant over all gateways that share a Redis.

Fixed windows of a minute, as OpenAI's headers describe them. A request's tokens are reserved when it starts, its prompt
and the output that it asks room for, and settled when it ends: what was not generated is given back, what was generated
without having been asked for is counted, also beyond the limit, so the next request pays for it. A chat that sets no
limit reserves its prompt alone, as with OpenAI, who counts `max_tokens` where it is said. Most clients do not say it,
and all the room that the context leaves is more than many a limit: they would never be served. Without Redis every
gateway counts for itself: a limit is then too generous, never an outage.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import structlog

from services.gateway.access.counters import Amount, Count, MemoryCounters, RedisCounters
from shared.access.api_keys import KeyRecord
from shared.errors import Unavailable

log = structlog.get_logger(__name__)

WINDOW_S = 60.0
REQUESTS, TOKENS = "requests", "tokens"
RATE_HEADERS = [f"x-ratelimit-{part}-{kind}" for part in ("limit", "remaining", "reset") for kind in (REQUESTS, TOKENS)]

_RETRY_REDIS_S = 5.0


@dataclass(frozen=True, slots=True)
class Standing:
    """How a caller stands with one of its limits; the names are those of OpenAI's headers.

    Attributes:
        kind: `requests` or `tokens`.
        reset_s: Until the window ends.
    """

    kind: str
    limit: int
    remaining: int
    reset_s: float

    def headers(self) -> dict[str, str]:
        """`x-ratelimit-*`."""
        return {
            f"x-ratelimit-limit-{self.kind}": str(self.limit),
            f"x-ratelimit-remaining-{self.kind}": str(max(0, self.remaining)),
            f"x-ratelimit-reset-{self.kind}": f"{math.ceil(self.reset_s)}s",
        }


@dataclass(frozen=True, slots=True)
class Taken:
    """An amount that was asked for.

    Attributes:
        is_granted: It is counted; else it did not fit.
        window: In which, so that it is given back there and nowhere else.
    """

    is_granted: bool
    amount: int
    standing: Standing
    window: str


class RateLimits:
    """The counters of all keys. One for the gateway."""

    def __init__(self, redis_url: str = "") -> None:
        """Counts in Redis if there is a URL."""
        self._local = MemoryCounters()
        self._shared = RedisCounters(redis_url) if redis_url else None
        self._down_until_s = 0.0

    async def close(self) -> None:
        """Closes the connections."""
        if self._shared is not None:
            await self._shared.close()

    async def take(self, key: KeyRecord, kind: str, amount: int) -> Taken | None:
        """Takes an amount if the limit allows all of it, in one step; 0 only looks. None without a limit."""
        limit = _limit(key, kind)
        if not limit:
            return None
        [count] = await self._count(_amount(key, kind, amount, limit=limit if amount else -1))
        return Taken(count.fits, amount, _standing(key, kind, count), count.window)

    async def take_request(self, key: KeyRecord) -> list[Taken]:
        """Takes a request, if the minute has tokens left too: in one step, of each limit that the key has."""
        amounts: dict[str, Amount] = {}
        if key.tokens_per_minute:  # none is taken: there must be room for one
            amounts[TOKENS] = _amount(key, TOKENS, 0, limit=key.tokens_per_minute - 1)
        if key.requests_per_minute:
            amounts[REQUESTS] = _amount(key, REQUESTS, 1, limit=key.requests_per_minute)
        if not amounts:
            return []
        counts = await self._count(*amounts.values())
        return [
            Taken(count.fits, amount.amount, _standing(key, kind, count), count.window)
            for (kind, amount), count in zip(amounts.items(), counts, strict=True)
        ]

    async def settle(self, key: KeyRecord, taken: Taken, amount: int) -> None:
        """What was taken came to an amount: the rest goes back if its window still lasts; more is counted now."""
        difference = amount - taken.amount
        if difference:
            window = taken.window if difference < 0 else ""
            await self._count(_amount(key, taken.standing.kind, difference, window=window))

    async def _count(self, *amounts: Amount) -> list[Count]:
        if self._shared is not None and time.monotonic() >= self._down_until_s:
            try:
                return await self._shared.count(*amounts)
            except Unavailable as exc:
                log.warning("rate_limits_counted_locally", error=exc.message)
                self._down_until_s = time.monotonic() + _RETRY_REDIS_S
        return await self._local.count(*amounts)


def _limit(key: KeyRecord, kind: str) -> int:
    return key.requests_per_minute if kind == REQUESTS else key.tokens_per_minute


def _amount(key: KeyRecord, kind: str, amount: int, *, limit: int = -1, window: str = "") -> Amount:
    return Amount(f"tandem:{kind}:{{{key.tenant}:{key.key_id}}}", amount, WINDOW_S, limit, window)


def _standing(key: KeyRecord, kind: str, count: Count) -> Standing:
    limit = _limit(key, kind)
    return Standing(kind, limit, limit - count.used, count.left_s)
