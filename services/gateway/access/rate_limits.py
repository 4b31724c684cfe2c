"""Requests and tokens per minute, counted for a tenant over all gateways that share a Redis.

Fixed windows of a minute, as OpenAI's headers describe them. Tokens are counted as they really were: the prompt when a
request starts, the output when it ends, also beyond the limit, so the next request pays for it. Without Redis every
gateway counts for itself: a limit is then too generous, never an outage.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import structlog
from limits import RateLimitItem, RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage, Storage
from limits.aio.strategies import FixedWindowRateLimiter
from limits.errors import StorageError
from limits.storage import storage_from_string

from shared.access.api_keys import KeyRecord

log = structlog.get_logger(__name__)

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


class RateLimits:
    """The counters. One for the gateway."""

    def __init__(self, redis_url: str = "") -> None:
        """Counts in Redis if there is a URL."""
        self._local = FixedWindowRateLimiter(MemoryStorage())
        self._shared: FixedWindowRateLimiter | None = None
        self._down_until_s = 0.0
        if redis_url.startswith(("redis://", "rediss://")):
            storage = storage_from_string(f"async+{redis_url}", implementation="redispy", wrap_exceptions=True)
            assert isinstance(storage, Storage)
            self._shared = FixedWindowRateLimiter(storage)

    async def standing(self, key: KeyRecord, kind: str) -> Standing | None:
        """Now, counting nothing; None without a limit."""
        item = _item(key, kind)
        if item is None:
            return None
        limiter = self._limiter()
        try:
            window = await limiter.get_window_stats(item, key.tenant, key.key_id)
        except StorageError as exc:
            self._note_outage(exc)
            window = await self._local.get_window_stats(item, key.tenant, key.key_id)
        has_begun = window.remaining < item.amount  # else it begins when something is counted
        reset_s = max(0.0, window.reset_time - time.time()) if has_begun else item.get_expiry()
        return Standing(kind, item.amount, window.remaining, reset_s)

    async def count(self, key: KeyRecord, kind: str, amount: int) -> None:
        """Counts, whether or not the limit is reached with it."""
        item = _item(key, kind)
        if item is None or amount <= 0:
            return
        try:
            await self._limiter().hit(item, key.tenant, key.key_id, cost=amount)
        except StorageError as exc:
            self._note_outage(exc)
            await self._local.hit(item, key.tenant, key.key_id, cost=amount)

    def _limiter(self) -> FixedWindowRateLimiter:
        if self._shared is None or time.monotonic() < self._down_until_s:
            return self._local
        return self._shared

    def _note_outage(self, exc: StorageError) -> None:
        if time.monotonic() >= self._down_until_s:
            log.warning("rate_limits_counted_locally", error=str(exc))
        self._down_until_s = time.monotonic() + _RETRY_REDIS_S


def _item(key: KeyRecord, kind: str) -> RateLimitItem | None:
    amount = key.requests_per_minute if kind == "requests" else key.tokens_per_minute
    return RateLimitItemPerMinute(amount, namespace=f"tandem:{kind}") if amount else None
