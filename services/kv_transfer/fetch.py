"""Serves peers: pins blocks and grants their transfer exactly as long as a fetch lives.

A fetch is a call of its own (`Fetch`), or one of many on a stream (`Fetches`, see `shared.rpc.call_stream`), as
`pull.py` has it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import structlog
from grpc.aio import ServicerContext

from protos import kv_transfer_pb2 as pb
from protos import kv_transfer_pb2_grpc as rpc
from services.kv_transfer.hints import BlockHints
from services.kv_transfer.holdings import Holdings, Pinned
from shared.errors import (
    FingerprintMismatch,
    InvalidRequest,
    Overloaded,
    PeerNotAllowed,
    StaleIncarnation,
    TandemError,
    Unavailable,
)
from shared.identity import BlockHash, Incarnation, split_hashes
from shared.rpc.served_calls import ServedCalls
from shared.rpc.tls import peer_identity
from shared.settle import settle
from shared.transfer.grants import GRANT_S, Grant, GrantBook
from shared.transfer.protocol import MAX_BLOCKS

log = structlog.get_logger(__name__)

MAX_OPEN_FETCHES = 256

_Context = ServicerContext[Any, Any]
_Reply = Callable[[pb.FetchReply], Awaitable[None]]


class KvFetchServicer(rpc.KvFetchServicer):
    """The holder's side of a transfer.

    Args:
        data_address: Host and port of the UCX listener, as peers dial it.
        admit_source: Lets an address connect to that listener.
        status: Fills a TransferStatus reply.
    """

    def __init__(
        self,
        *,
        incarnation: Incarnation,
        holdings: Holdings,
        grants: GrantBook,
        hints: BlockHints,
        data_address: tuple[str, int],
        admit_source: Callable[[str], None],
        status: Callable[[], pb.TransferStatusReply],
    ) -> None:
        self._incarnation = incarnation
        self._holdings = holdings
        self._grants = grants
        self._hints = hints
        self._data_host, self._data_port = data_address
        self._admit_source = admit_source
        self._status = status
        self.is_draining = False
        self.active = 0

    async def TransferStatus(  # noqa: N802 - the name is gRPC's
        self,
        request: pb.TransferStatusRequest,
        context: ServicerContext[pb.TransferStatusRequest, pb.TransferStatusReply],
    ) -> pb.TransferStatusReply:
        """How this process stands."""
        return self._status()

    async def Fetch(  # type: ignore[override]  # noqa: N802 - the stubs don't know coroutines that write by themselves
        self, request: pb.FetchRequest, context: _Context
    ) -> None:
        """One reply, the grant; then the call stays open until all is sent, or either side gives up."""
        await self._serve(request, context, context.write)

    async def Fetches(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[pb.FetchAsk], context: _Context
    ) -> None:
        """The same for each fetch of a stream."""

        async def serve(request: pb.FetchRequest, reply: _Reply) -> None:
            await self._serve(request, context, reply)

        # By itself: were it sent with the first answer, and that write cancelled, gRPC could not end the call any more.
        await context.send_initial_metadata(())
        await ServedCalls(serve, context.write, pb.FetchAnswer, limit=MAX_OPEN_FETCHES).run(request_iterator)

    async def _serve(self, request: pb.FetchRequest, context: _Context, reply: _Reply) -> None:
        try:
            _check_requester(request.requester, context)
            hashes = self._admit(request)
            self._admit_source(source_address(context.peer()))
        except TandemError as exc:
            log.info("fetch_refused", session_id=request.session_id, code=exc.code, reason=exc.message)
            await reply(pb.FetchReply(refused=exc.code))
            return
        self.active += 1
        try:
            async with self._holdings.pin(hashes) as pinned:
                await self._offer(pinned, hashes, request, reply)
        finally:
            self.active -= 1

    def _admit(self, request: pb.FetchRequest) -> list[BlockHash]:
        if request.incarnation != self._incarnation:
            raise StaleIncarnation(f"{request.incarnation} is meant, this is {self._incarnation}")
        if request.fingerprint != self._holdings.fingerprint:
            raise FingerprintMismatch(f"{request.fingerprint!r} against {self._holdings.fingerprint!r} here")
        if self.is_draining:
            raise Unavailable("draining")
        if self.active >= MAX_OPEN_FETCHES:
            raise Overloaded(f"{self.active} open fetches, at most {MAX_OPEN_FETCHES}")
        try:
            hashes = split_hashes(request.block_hashes)
        except ValueError as exc:
            raise InvalidRequest(str(exc)) from exc
        if not 0 < len(hashes) <= MAX_BLOCKS:
            raise InvalidRequest(f"{len(hashes)} blocks; allowed are 1 to {MAX_BLOCKS}")
        return hashes

    async def _offer(self, pinned: Pinned, hashes: list[BlockHash], request: pb.FetchRequest, reply: _Reply) -> None:
        available = [i for i, source in enumerate(pinned.sources) if source is not None]
        if len(available) < len(hashes):
            self._hints.deny([hashes[i] for i, source in enumerate(pinned.sources) if source is None])
        if not available:
            await reply(pb.FetchReply())
            return
        grant = self._grants.issue(
            [source for source in pinned.sources if source is not None],
            requester=request.requester,
            fingerprint=request.fingerprint,
        )
        try:
            await reply(
                pb.FetchReply(
                    transfer_id=grant.transfer_id.hex(),
                    token=grant.key,
                    expires_ms=grant.claims.expires_ms,
                    ucx_host=self._data_host,
                    ucx_port=self._data_port,
                    block_bytes=grant.block_bytes,
                    available=available,
                )
            )
            await _until_over(grant, pinned)
        finally:
            self._grants.revoke(grant)
            await settle(_stop(grant))
            for block_hash in grant.corrupt:
                self._holdings.tiers.discard_corrupt(block_hash)


def source_address(peer: str) -> str:
    """The address in what gRPC says of a caller, e.g. `ipv4:10.0.0.7:41234`; others come back as they are."""
    kind, _, address = peer.partition(":")
    return address.rpartition(":")[0] if kind == "ipv4" else peer


def _check_requester(requester: str, context: _Context) -> None:
    """Where the caller has a certificate, it must be that of the kv_transfer beside the worker that it names.

    Raises:
        PeerNotAllowed: It is another's.
    """
    caller = peer_identity(context.auth_context())
    if caller is not None and caller.member_id not in ("", requester):
        raise PeerNotAllowed(f"{caller.member_id} asks in the name of {requester}")


async def _until_over(grant: Grant, pinned: Pinned) -> None:
    """Returns when the transfer is over or was never begun.

    Raises:
        Unavailable: The worker let go of its blocks.
    """
    ends: set[asyncio.Future[Any]] = {grant.finished} if pinned.lost is None else {grant.finished, pinned.lost}
    done, _ = await asyncio.wait(ends, timeout=GRANT_S, return_when=asyncio.FIRST_COMPLETED)
    if not done:
        if grant.endpoint is None:
            raise Unavailable(f"the grant was not claimed within {GRANT_S:g} s")
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    if not grant.finished.done():
        raise Unavailable("the worker ended the pin")
    if not grant.finished.result():
        raise Unavailable("the transfer broke off")


async def _stop(grant: Grant) -> None:
    """On return nothing reads the grant's sources: only then may their pins go."""
    if grant.endpoint is not None and not grant.finished.done():
        await grant.endpoint.close()
        await asyncio.wait({grant.finished})
