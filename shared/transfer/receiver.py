"""The pulling side: brings granted blocks into memory and checks every one."""

from __future__ import annotations

import collections
import contextlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import structlog

from shared.identity import BlockHash
from shared.settle import settle
from shared.transfer.arrival_checks import ArrivalChecks
from shared.transfer.checksum import Block
from shared.transfer.claims import Claims
from shared.transfer.protocol import WITHDRAWN, Header, Trailer, new_tag_base, trailer_bytes
from shared.transfer.transport import Endpoint, Transport, TransportError

log = structlog.get_logger(__name__)

_CORES = len(os.sched_getaffinity(0))

POOL_IDLE_S = 60.0
"""Idle endpoints are let go after this long, well before the sender would."""
MAX_POOLED = 8
"""Idle endpoints per peer and lane."""

_PoolKey = tuple[str, str, int, int]  # peer, host, port, lane


@dataclass(frozen=True, slots=True)
class Offer:
    """What a holder granted.

    Attributes:
        peer: Names one life of the holder: endpoints to an earlier life are never used again.
        host: Of the holder's UCX listener.
        claims: What the grant covers, as this side knows it.
        key: Of the grant.
    """

    peer: str
    host: str
    port: int
    claims: Claims
    key: bytes


@dataclass(frozen=True, slots=True)
class Received:
    """The outcome of one transfer.

    Attributes:
        verified: Per block, in the order asked for: the bytes are those that the hash names.
        withdrawn: Per block: the holder gave it away while it was under way.
        verify_s: Spent on checksums, most of it while later blocks arrived.
    """

    verified: list[bool]
    withdrawn: list[bool]
    verify_s: float


class BlockReceiver:
    """Pulls blocks over pooled endpoints, each transfer on the lane that has the fewest. Runs on the event loop.

    Args:
        executor: Where checksums are computed.
    """

    def __init__(self, transport: Transport, executor: Executor) -> None:
        self._transport = transport
        self._executor = executor
        self._idle: dict[_PoolKey, collections.deque[tuple[float, Endpoint]]] = {}
        self._receiving = [0] * transport.lanes
        self.received_bytes = 0

    @property
    def lanes(self) -> int:
        """Transfers that are sooner done at the same time than one after the other."""
        return self._transport.lanes

    async def receive(self, offer: Offer, hashes: Sequence[BlockHash], slots: Sequence[Block]) -> Received:
        """Takes an offer up: block `hashes[i]` lands in `slots[i]`.

        However this ends - result, error, cancellation - no transport writes to `slots` afterwards. Bound it with
        `asyncio.timeout`: a peer that hangs is not noticed here.

        Raises:
            TransportError: The connection failed or the holder refused.
            ProtocolError: The holder talks nonsense.
        """
        lane = min(range(self.lanes), key=self._receiving.__getitem__)
        pool = offer.peer, offer.host, offer.port, lane
        self._receiving[lane] += 1
        try:
            pooled = self._take_idle(pool)
            if pooled is not None:
                try:
                    return await self._receive_on(pooled, pool, offer, hashes, slots)
                except TransportError as exc:
                    # It may have died while idle; the grant is still good if its header never arrived.
                    log.info("pooled_endpoint_failed", peer=offer.peer, reason=str(exc))
            fresh = await self._transport.connect(offer.host, offer.port, lane=lane)
            return await self._receive_on(fresh, pool, offer, hashes, slots)
        finally:
            self._receiving[lane] -= 1

    async def close_idle(self, *, older_than_s: float = POOL_IDLE_S) -> None:
        """Lets go of endpoints that nobody used for so long; 0 = of all. Call it now and then."""
        limit_s = time.monotonic() - older_than_s
        stale: list[Endpoint] = []
        for key, idle in list(self._idle.items()):
            while idle and (idle[0][0] <= limit_s or not idle[0][1].is_open):
                stale.append(idle.popleft()[1])
            if not idle:
                del self._idle[key]
        for endpoint in stale:
            await settle(endpoint.close())

    async def _receive_on(
        self, endpoint: Endpoint, pool: _PoolKey, offer: Offer, hashes: Sequence[BlockHash], slots: Sequence[Block]
    ) -> Received:
        assert offer.claims.num_blocks == len(slots) == len(hashes)
        is_done = False
        checks = ArrivalChecks(slots, self._executor, hands_over=self._has_spare_core)
        try:
            header = Header.signed(offer.claims, new_tag_base(), offer.key)
            ending = await endpoint.receive_blocks(
                slots,
                header.tag_base,
                checks.arrived,
                request=header.encode(),
                last_bytes=trailer_bytes(len(slots)),
            )
            checksums = await checks.finish()
            trailer = Trailer.decode(ending, offer.claims.transfer_id, offer.key)
            is_done = True
        finally:
            if not (is_done and self._keep_idle(pool, endpoint)):
                await settle(_let_go(endpoint))
            if not is_done:
                await settle(checks.stop())
        self.received_bytes += sum(slot.nbytes for slot in slots)
        found = zip(hashes, checksums, strict=True)
        verified = [sent == block for sent, block in zip(trailer.blocks, found, strict=True)]
        withdrawn = [name == WITHDRAWN for name, _ in trailer.blocks]
        return Received(verified, withdrawn, checks.seconds)

    def _has_spare_core(self) -> bool:
        """There is one that neither the busy lanes nor, where it is as busy, the sender needs."""
        is_sender_busy = self.lanes == 1
        return sum(map(bool, self._receiving)) + is_sender_busy < _CORES

    def _take_idle(self, pool: _PoolKey) -> Endpoint | None:
        idle = self._idle.get(pool)
        if not idle or not idle[-1][1].is_open:
            return None
        return idle.pop()[1]

    def _keep_idle(self, pool: _PoolKey, endpoint: Endpoint) -> bool:
        idle = self._idle.setdefault(pool, collections.deque())
        if len(idle) >= MAX_POOLED or not endpoint.is_open:
            return False
        idle.append((time.monotonic(), endpoint))
        return True


async def _let_go(endpoint: Endpoint) -> None:
    """On return nothing writes the slots."""
    with contextlib.suppress(TransportError):
        await endpoint.close()
