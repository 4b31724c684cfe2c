"""Puts a session on a worker: gathers what `placement` decides on, and submits.

A session that lost its worker comes here again. What it has generated counts as part of its prompt then: that is what
the next worker needs KV for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

import structlog

from services.gateway.sessions.placement import (
    Holder,
    Placement,
    Policy,
    Prompt,
    Snapshot,
    can_take_work,
    holders_of,
    place,
)
from services.gateway.sessions.session import Session
from services.gateway.sessions.workers import Workers
from shared.directory.client import Directory
from shared.errors import Unavailable
from shared.identity import TOKEN_BYTES, Fingerprint, Incarnation, iter_hashes, namespace_hash

log = structlog.get_logger(__name__)

LOOK_AGAIN_S = 0.05


class Dispatcher:
    """One for the gateway; stateless but for what `Workers` counts."""

    def __init__(
        self,
        directory: Directory,
        workers: Workers,
        *,
        policy: Policy,
        min_remote_tokens: int,
        timeout_s: float,
    ) -> None:
        self._directory = directory
        self._workers = workers
        self._policy = policy
        self._min_remote_tokens = min_remote_tokens
        self._timeout_s = timeout_s
        self._log = log.bind()  # once: the module's finds out anew at each line how lines are logged

    async def submit(
        self,
        session: Session,
        *,
        cache_salt: str,
        priority: int,
        wait_s: float,
        excluding: frozenset[Incarnation] = frozenset(),
    ) -> None:
        """Places and submits a session, for the first time or once more.

        Args:
            session: In PLACING; SUBMITTED afterwards. Some choice of it is unfinished.
            cache_salt: Part of the name of its blocks.
            priority: Lower is sooner.
            wait_s: How long to wait for a decode worker if there is none.
            excluding: Workers that have given it up.

        Raises:
            Unavailable: No decode worker can take it.
        """
        leader, *others = session.unfinished_choices
        fingerprint = session.placement.decode.fingerprint if session.placement and session.has_output else None
        kinds = await self._kinds(wait_s, excluding, fingerprint)
        prompt = await self._prompt(leader.packed_tokens, cache_salt, kinds)
        further = {choice.index: await self._prompt(choice.packed_tokens, cache_salt, kinds) for choice in others
                   if choice.token_ids}  # fmt: skip
        snapshot = self._workers.snapshot(excluding, fingerprint)  # as of now: the lookups may have taken a while
        placement = place(prompt, snapshot, self._policy, self._min_remote_tokens)
        if placement is None:
            raise Unavailable("no decode worker is ready")
        session.begin_attempt(placement)
        self._workers.submit(
            session,
            holders=_holders(further, snapshot, placement),
            cache_salt=cache_salt,
            priority=priority,
            timeout_s=self._timeout_s,
        )
        self._log.debug(
            "session_placed",
            session_id=session.session_id,
            worker_id=placement.decode.worker_id,
            mode=placement.mode.value,
            attempt=session.attempts,
        )

    async def _kinds(
        self, wait_s: float, excluding: frozenset[Incarnation], fingerprint: Fingerprint | None
    ) -> Mapping[Fingerprint, int]:
        """The kinds of KV in the fleet, mostly one, with their block sizes.

        Waits for a first decode worker: any start order of the services works.
        """
        deadline_s = time.monotonic() + wait_s
        while True:
            workers = self._workers.decode_workers(excluding, fingerprint)
            if kinds := {worker.fingerprint: worker.block_size for worker in workers if can_take_work(worker)}:
                return kinds
            if time.monotonic() >= deadline_s:
                waited = f" within {wait_s:g} s" if wait_s else ""
                raise Unavailable(f"no decode worker became ready{waited}")
            await asyncio.sleep(LOOK_AGAIN_S)

    async def _prompt(self, packed: bytes, cache_salt: str, kinds: Mapping[Fingerprint, int]) -> Prompt:
        """What placement needs to know, who has how much of it among that: asked once per kind of KV."""
        prefixes: dict[Fingerprint, Mapping[int, int]] = {}
        for fingerprint, block_size in kinds.items():
            block_bytes = block_size * TOKEN_BYTES
            usable = (len(packed) - 1) // block_bytes * block_bytes  # the last token is computed by whoever samples
            if not usable:
                continue
            # Hashed as far as it is looked up: of a prompt that nobody has, that is a few blocks.
            hashes = iter_hashes(namespace_hash(fingerprint, cache_salt), packed[:usable], block_size)
            prefixes[fingerprint] = await self._directory.longest_prefixes(hashes)
        return Prompt(len(packed) // TOKEN_BYTES, prefixes)


def _holders(prompts: Mapping[int, Prompt], snapshot: Snapshot, placement: Placement) -> dict[int, tuple[Holder, ...]]:
    return {index: holders_of(prompt, snapshot, placement.decode) for index, prompt in prompts.items()}
