"""Lets a request in, or says when to come again. Nothing waits here: what cannot start soon is refused at once."""

from __future__ import annotations

import asyncio
import math
from collections import Counter

from services.gateway.access.caller import Caller
from services.gateway.access.rate_limits import TOKENS, RateLimits, Standing, Taken
from shared.errors import LargerThanLimit, RateLimited


class Ticket:
    """A request that was let in; closed exactly once, when it ends."""

    def __init__(self, admission: Admission, caller: Caller, prompt_tokens: int, taken: Taken | None) -> None:
        self._admission = admission
        self._caller = caller
        self._prompt_tokens = prompt_tokens
        self._taken = taken
        self._is_closed = False

    @property
    def caller(self) -> Caller:
        """Whose request it is."""
        return self._caller

    def close(self, output_tokens: int) -> None:
        """The request ended; idempotent, never blocks."""
        if not self._is_closed:
            self._is_closed = True
            self._admission.leave(self._caller, self._taken, self._prompt_tokens + output_tokens)


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
        self._settling: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Settles what has ended; owned by the gateway, closed with it."""
        await asyncio.gather(*self._settling, return_exceptions=True)
        await self._limits.close()

    async def count_request(self, caller: Caller) -> None:
        """Counts a request against its caller's limits, before anything is done for it. `caller.standings` tells them.

        Raises:
            RateLimited: Too many requests, or more tokens than allowed, in this minute; the request is not counted.
        """
        if caller.key is None:
            return
        taken = await self._limits.take_request(caller.key)
        caller.standings.update({one.standing.kind: one.standing for one in taken})
        for one in taken:
            if not one.is_granted:
                raise _used_up(caller, one.standing)

    async def enter(self, caller: Caller, model: str, prompt_tokens: int, output_tokens: int = 0) -> Ticket:
        """Lets a request in whose prompt is known.

        Args:
            caller: Whose it is.
            model: What it asks for.
            prompt_tokens: Of all its prompts.
            output_tokens: That it asks room for; 0 = it sets no limit.

        Raises:
            PermissionDenied: The key does not allow the model.
            RateLimited: Too much is under way, or the minute has not so many tokens left.
            LargerThanLimit: No minute has so many.
        """
        caller.check_may_use(model)
        limit = (caller.key.max_concurrent if caller.key else 0) or self._max_tenant_concurrent
        for count, bound, whose in (
            (self._open[caller.tenant], limit, f"tenant {caller.tenant} has"),
            (self._open.total(), self._max_concurrent, "the gateway has"),
        ):
            if bound and count >= bound:
                raise RateLimited(f"{whose} {count} requests under way, the limit is {bound}", retry_after_s=1)
        self._open[caller.tenant] += 1
        try:
            taken = await self._reserve(caller, prompt_tokens, output_tokens)
        except BaseException:
            self._forget(caller)
            raise
        return Ticket(self, caller, prompt_tokens, taken)

    async def _reserve(self, caller: Caller, prompt_tokens: int, output_tokens: int) -> Taken | None:
        if caller.key is None:
            return None
        taken = await self._limits.take(caller.key, TOKENS, prompt_tokens + output_tokens)
        if taken is None:
            return None
        standing = taken.standing
        caller.standings[TOKENS] = standing
        if not taken.is_granted:
            asked = f"the prompt has {prompt_tokens} tokens" + (
                f" and the reply is to have up to {output_tokens}" if output_tokens else ""
            )
            if taken.amount > standing.limit:
                raise LargerThanLimit(f"{asked}; tenant {caller.tenant} may use {standing.limit} tokens per minute")
            raise RateLimited(
                f"{asked}; tenant {caller.tenant} has {max(0, standing.remaining)} left "
                f"of {standing.limit} tokens per minute",
                retry_after_s=math.ceil(standing.reset_s),
            )
        return taken

    def leave(self, caller: Caller, taken: Taken | None, tokens: int) -> None:
        """A request of so many tokens in all ended; called by its ticket."""
        self._forget(caller)
        if caller.key is not None and taken is not None:
            task = asyncio.create_task(self._limits.settle(caller.key, taken, tokens))
            self._settling.add(task)
            task.add_done_callback(self._settling.discard)

    def _forget(self, caller: Caller) -> None:
        self._open[caller.tenant] -= 1
        if not self._open[caller.tenant]:
            del self._open[caller.tenant]


def _used_up(caller: Caller, standing: Standing) -> RateLimited:
    return RateLimited(
        f"tenant {caller.tenant} reached its {standing.limit} {standing.kind} per minute",
        retry_after_s=standing.reset_s,
    )
