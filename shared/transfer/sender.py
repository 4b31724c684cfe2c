"""The serving side: waits for headers on the endpoints that peers open, and sends what was granted."""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import Executor

import structlog

from shared.identity import BlockHash
from shared.settle import settle
from shared.transfer.checksum import checksums_of
from shared.transfer.grants import Grant, GrantBook, GrantRefused
from shared.transfer.protocol import HEADER_BYTES, WITHDRAWN, Header, ProtocolError, Trailer
from shared.transfer.transport import Endpoint, TransportError

log = structlog.get_logger(__name__)

MAX_ENDPOINTS = 512
HANDSHAKE_S = 3.0
"""An endpoint that has not said anything valid for so long is closed."""
IDLE_S = 300.0
"""Likewise one that has been served before; peers let go of theirs sooner."""


class BlockSender:
    """Serves granted blocks over every endpoint that peers open. Runs on the event loop.

    Args:
        executor: Where checksums are computed, beside the sending.
    """

    def __init__(
        self,
        grants: GrantBook,
        executor: Executor,
        *,
        handshake_s: float = HANDSHAKE_S,
        idle_s: float = IDLE_S,
        max_endpoints: int = MAX_ENDPOINTS,
    ) -> None:
        self._grants = grants
        self._executor = executor
        self._handshake_s = handshake_s
        self._idle_s = idle_s
        self._max_endpoints = max_endpoints
        self._serving: set[asyncio.Task[None]] = set()
        self.sent_bytes = 0
        self.refused = 0

    @property
    def num_endpoints(self) -> int:
        """Connections from peers."""
        return len(self._serving)

    def serve(self, endpoint: Endpoint) -> None:
        """Serves `endpoint` until it or the peer ends; for `Transport.start`."""
        is_welcome = len(self._serving) < self._max_endpoints
        task = asyncio.get_running_loop().create_task(self._serve(endpoint, is_welcome))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def stop(self) -> None:
        """Closes every endpoint, in the middle of a transfer too."""
        serving = list(self._serving)
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)

    async def _serve(self, endpoint: Endpoint, is_welcome: bool) -> None:
        try:
            if not is_welcome:
                self.refused += 1
                log.warning("endpoint_refused", endpoints=len(self._serving), limit=self._max_endpoints)
                return
            patience_s, coming = self._handshake_s, endpoint.receive(HEADER_BYTES)
            while True:
                async with asyncio.timeout(patience_s):
                    header = Header.decode(await coming)
                coming = endpoint.receive(HEADER_BYTES)  # already now: the transport's thread is woken once for both
                await self._transfer(endpoint, self._grants.claim(header, endpoint), header.tag_base)
                patience_s = self._idle_s
        except (ProtocolError, GrantRefused) as exc:
            self.refused += 1
            log.warning("transfer_refused", reason=str(exc))
        except (TransportError, TimeoutError) as exc:
            log.debug("endpoint_ended", reason=repr(exc))
        finally:
            with contextlib.suppress(TransportError):  # the data plane failed as a whole; its owner was told
                await settle(endpoint.close())

    async def _transfer(self, endpoint: Endpoint, grant: Grant, tag_base: int) -> None:
        """Sends a claimed grant; `grant.finished` is done only when nothing reads its sources any more."""
        is_sent = False
        unknown = [source.block for source in grant.sources if source.checksum is None or source.is_suspect]
        checking = checksums_of(unknown, self._executor)
        try:
            await self._send(endpoint, grant, tag_base, checking)
            is_sent = True
            self.sent_bytes += grant.block_bytes * len(grant.sources)
        finally:
            if not is_sent:
                await settle(_stop_reading(endpoint, checking))
            if not grant.finished.done():
                grant.finished.set_result(is_sent)

    async def _send(self, endpoint: Endpoint, grant: Grant, tag_base: int, checking: asyncio.Future[list[int]]) -> None:
        blocks = [source.block for source in grant.sources]
        if checking.done():  # the trailer can follow without a way through the event loop
            ready = _Ready(grant, checking.result())
            await endpoint.send_blocks(blocks, tag_base, ready.trailer)
            return
        await endpoint.send_blocks(blocks, tag_base)
        await endpoint.send(_Ready(grant, await settle(checking)).trailer())


class _Ready:
    """The trailer of a grant, made as if every block stayed in place until it was sent.

    A stored checksum wins over what the bytes say now: so the receiver sees damage too.
    """

    def __init__(self, grant: Grant, computed: list[int]) -> None:
        self._grant = grant
        self._entries: list[tuple[BlockHash, int]] = []
        found = iter(computed)
        for source in grant.sources:
            checksum = source.checksum
            if checksum is None:
                checksum = next(found)
            elif source.is_suspect and next(found) != checksum:
                grant.corrupt.append(source.block_hash)
            self._entries.append((source.block_hash, checksum))
        self._encoded = Trailer(grant.transfer_id, self._entries).encode(grant.key)

    def trailer(self) -> bytes:
        """Names what was sent; to be called when it was. Quick: the receiver waits for it."""
        is_intact = [source.is_intact() for source in self._grant.sources]
        if all(is_intact):
            return self._encoded
        entries = [entry if kept else (WITHDRAWN, 0) for entry, kept in zip(self._entries, is_intact, strict=True)]
        return Trailer(self._grant.transfer_id, entries).encode(self._grant.key)


async def _stop_reading(endpoint: Endpoint, checking: asyncio.Future[list[int]]) -> None:
    await endpoint.close()
    await asyncio.wait([checking])
