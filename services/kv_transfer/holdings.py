"""What this process can send: its worker's sealed blocks and its own tiers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import structlog

from services.kv_transfer.attachment import Attachment, WorkerPin
from services.kv_transfer.orphan import Orphan
from services.kv_transfer.tiers import Tiers
from shared.errors import TandemError
from shared.identity import BlockHash, Fingerprint
from shared.transfer.grants import Source

log = structlog.get_logger(__name__)

_DEATH_S = 0.2  # from a dead worker's first broken call to its last
_DEATH_POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class Pinned:
    """Blocks that stay where they are while the pin is held.

    Attributes:
        sources: Per hash, or None where neither worker nor tier has it.
        lost: Done when the worker's share of the pin ended early; None without such a share.
    """

    sources: list[Source | None]
    lost: asyncio.Future[None] | None


class Holdings:
    """Answers for the worker that is attached now, if one is, and for the tiers, which outlive workers.

    Attributes:
        attachment: The worker's present life.
        orphan: What its last life left, while there is no other.
        fingerprint: Of all blocks here: that of the worker which attached last; "" before the first.
    """

    def __init__(self, tiers: Tiers) -> None:
        self.tiers = tiers
        self.attachment: Attachment | None = None
        self.orphan: Orphan | None = None
        self.fingerprint = Fingerprint("")

    async def attach(self, attachment: Attachment) -> None:
        """Takes a worker's arena into account, in the place of another's if there is one. Cancelled, it may have.

        Raises:
            Unavailable: Transfers of the life before do not end.
        """
        await self.end_orphan()
        if (previous := self.attachment) is not None:
            # A worker whose connection broke comes with the same arena, into which its old pulls may still be ending.
            attachment.destinations = previous.destinations
            previous.ended.set()
        self.attachment = attachment
        self.fingerprint = attachment.fingerprint
        await self.tiers.adopt(attachment.fingerprint, attachment.block_bytes)

    def detach(self, attachment: Attachment) -> bool:
        """A worker let go or was let go. If it is gone, what it had sealed is served on, by the table it kept of that.

        Returns:
            Whether it was the present one; nothing happens if another took its place already.
        """
        if self.attachment is not attachment:
            return False
        self.attachment = None
        if attachment.table is not None and not attachment.ended.is_set():
            self.orphan = Orphan(attachment, attachment.table)
        return True

    async def end_orphan(self) -> bool:
        """On return nothing reads or writes the arena of a worker that is gone; returns whether there was one.

        Raises:
            Unavailable: A transfer does not end.
        """
        if self.orphan is None:
            return False
        await self.orphan.end()
        self.orphan = None
        return True

    def remove_orphan(self) -> None:
        """This process ends, too: nobody is left who would know what the arena is."""
        if self.orphan is not None:
            self.orphan.unlink()

    @contextlib.asynccontextmanager
    async def pin(self, hashes: Sequence[BlockHash]) -> AsyncIterator[Pinned]:
        """Keeps blocks in place as long as the context is open: the worker's where it has them, else the tiers'."""
        async with contextlib.AsyncExitStack() as stack:
            sources: list[Source | None] = [None] * len(hashes)
            lost = None
            pin = await self._pin_worker(stack, hashes)
            if pin is not None:
                sources = pin.sources
                lost = pin.lost if any(sources) else None
            if absent := [i for i, source in enumerate(sources) if source is None]:
                entries = await self.tiers.pin([hashes[i] for i in absent])
                stack.callback(self.tiers.unpin, entries)
                for i, entry in zip(absent, entries, strict=True):
                    if entry is not None:
                        sources[i] = Source(entry.block_hash, entry.block, entry.checksum)
            yield Pinned(sources, lost)

    async def _pin_worker(self, stack: contextlib.AsyncExitStack, hashes: Sequence[BlockHash]) -> WorkerPin | None:
        """In the worker's arena, also if the worker dies at this moment."""
        for _ in range(2):
            owner = self.attachment or self.orphan
            if owner is None:
                break
            try:
                return await stack.enter_async_context(owner.pin(hashes))
            except TandemError as exc:
                log.warning("worker_pin_failed", error=exc.message)
            deadline_s = time.monotonic() + _DEATH_S
            while self.attachment is owner and time.monotonic() < deadline_s:  # noqa: ASYNC110 - seldom
                await asyncio.sleep(_DEATH_POLL_S)
        return None
