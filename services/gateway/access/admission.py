"""Lets a request in, or says when to come again. Nothing waits here: what cannot start soon is refused at once."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from dataclasses import replace

from services.gateway.access.caller import Caller
from services.gateway.access.rate_limits import RateLimits, Standing
from shared.errors import PermissionDenied, RateLimited


class Ticket:
    """A request that was let in; closed exactly once, when it ends."""

    def __init__(self, admission: Admission, caller: Caller) -> None:
        self._admission = admission
        self._caller = caller
        self._is_closed = False

    @property
    def caller(self) -> Caller:
        """Whose request it is."""
        return self._caller

    def close(self, output_tokens: int) -> None:
        """The request ended; idempotent, never blocks."""
        if not self._is_closed:
            self._is_closed = True
            self._admission.leave(self._caller, output_tokens)


class Admission:
    """Counts what every tenant has under way. One for the gateway."""

    def __init__(self, limits: RateLimits, *, max_concurrent: int, max_tenant_concurrent: int) -> None:
        """Bounds.

        Args:
            limits: Per minute.
            max_concurrent: Requests under way at this gateway.
            max_tenant_concurrent: Of them, of one tenant; a key's own bound replaces it.
        """
        self._limits = limits
        self._max_concurrent = max_concurrent
        self._max_tenant_concurrent = max_tenant_concurrent
        self._open: Counter[str] = Counter()
        self._counting: set[asyncio.Task[None]] = set()

    async def standings(self, caller: Caller) -> list[Standing]:
        """How the caller stands with each of its limits, this request not counted."""
        if caller.key is None:
            return []
        return [s for kind in ("requests", "tokens") if (s := await self._limits.standing(caller.key, kind))]

    async def count_request(self, caller: Caller, standings: list[Standing] | None = None) -> list[Standing]:
        """Counts a request against its caller's limits, before anything is done for it; returns how it stands then.

        Args:
            caller: Whose it is.
            standings: If they are known already.

        Raises:
            RateLimited: Too many requests, or more tokens than allowed, in this minute.
        """
        if caller.key is None:
            return []
        standings = await self.standings(caller) if standings is None else standings
        for standing in standings:
            if standing.remaining <= 0:
                raise RateLimited(
                    f"tenant {caller.tenant} reached its {standing.limit} {standing.kind} per minute",
                    retry_after_s=standing.reset_s,
                )
        await self._limits.count(caller.key, "requests", 1)
        return [replace(s, remaining=s.remaining - 1) if s.kind == "requests" else s for s in standings]

    async def enter(self, caller: Caller, model: str, prompt_tokens: int) -> Ticket:
        """Lets a request in whose prompt is known.

        Raises:
            PermissionDenied: The key does not allow the model.
            RateLimited: Too much is under way, or the prompt is larger than a minute's tokens.
        """
        if not caller.may_use(model):
            raise PermissionDenied(f"this API key does not allow the model {model!r}", param="model")
        limit = (caller.key.max_concurrent if caller.key else 0) or self._max_tenant_concurrent
        for count, bound, whose in (
            (self._open[caller.tenant], limit, f"tenant {caller.tenant} has"),
            (self._open.total(), self._max_concurrent, "the gateway has"),
        ):
            if bound and count >= bound:
                raise RateLimited(f"{whose} {count} requests under way, the limit is {bound}", retry_after_s=1)
        if caller.key is not None and caller.key.tokens_per_minute:
            await self._count_prompt(caller, prompt_tokens)
        self._open[caller.tenant] += 1
        return Ticket(self, caller)

    async def _count_prompt(self, caller: Caller, prompt_tokens: int) -> None:
        assert caller.key is not None
        standing = await self._limits.standing(caller.key, "tokens")
        if standing is not None and prompt_tokens > standing.remaining:
            raise RateLimited(
                f"the prompt has {prompt_tokens} tokens; tenant {caller.tenant} has {max(0, standing.remaining)} left "
                f"of {standing.limit} tokens per minute",
                retry_after_s=math.ceil(standing.reset_s),
            )
        await self._limits.count(caller.key, "tokens", prompt_tokens)

    def leave(self, caller: Caller, output_tokens: int) -> None:
        """A request ended; called by its ticket."""
        self._open[caller.tenant] -= 1
        if not self._open[caller.tenant]:
            del self._open[caller.tenant]
        if caller.key is not None and caller.key.tokens_per_minute and output_tokens:
            task = asyncio.create_task(self._limits.count(caller.key, "tokens", output_tokens))
            self._counting.add(task)
            task.add_done_callback(self._counting.discard)
