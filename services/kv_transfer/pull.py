"""Brings sealed blocks into the worker's arena: out of the own tiers, or from a peer.

control.Pulls -> Puller.pull -> own tiers: copy, check
                             -> peer: a fetch per stripe on its stream (gRPC) grants -> BlockReceiver over UCX, checks
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import structlog

from protos import kv_transfer_pb2 as pb
from services.kv_transfer.attachment import Attachment
from services.kv_transfer.peers import TransferPeers
from services.kv_transfer.tiers import Tiers
from shared.directory.records import TransferRecord
from shared.errors import InternalError, InvalidRequest, RequestTimeout, TandemError
from shared.identity import BlockHash
from shared.settle import all_or_none
from shared.transfer.checksum import Block
from shared.transfer.claims import KEY_BYTES, TRANSFER_ID_BYTES, Claims
from shared.transfer.protocol import MAX_BLOCKS, ProtocolError
from shared.transfer.receiver import BlockReceiver, Offer
from shared.transfer.transport import TransportError

log = structlog.get_logger(__name__)

DEFAULT_TIMEOUT_S = 30.0
MAX_TIMEOUT_S = 600.0
STRIPED_BYTES = 32 << 20
"""To copy half of it takes several times as long as a fetch does before its first byte."""


@dataclass(frozen=True, slots=True)
class PullJob:
    """What the worker wants.

    Attributes:
        holder_id: Worker id; "" or the own one = the own tiers.
        holder_incarnation: Of the holder's kv_transfer; "" = whichever lives now.
        block_ids: Destination slots, one per hash.
        pull_id: One per pull in the worker's life; 0 = none.
    """

    session_id: str
    holder_id: str
    holder_incarnation: str
    block_hashes: Sequence[BlockHash]
    block_ids: Sequence[int]
    timeout_s: float
    pull_id: int = 0


@dataclass(slots=True)
class PullOutcome:
    """What became of each block; filled while the pull runs.

    Attributes:
        verified: Its bytes are in the slot, hash and checksum were checked.
        bytes: That arrived, good or not.
        missing: Blocks that the holder didn't have.
        mismatched: Blocks that arrived damaged, or were others.
        error: "" or what ended the pull early.
    """

    verified: list[bool]
    bytes: int = 0
    seconds: float = 0.0
    verify_s: float = 0.0
    missing: int = 0
    mismatched: int = 0
    error: str = ""


class Puller:
    """Runs the worker's pulls, many at once, each into slots of its own. Runs on the event loop."""

    def __init__(self, worker_id: str, tiers: Tiers, peers: TransferPeers, receiver: BlockReceiver) -> None:
        self._worker_id = worker_id
        self._tiers = tiers
        self._peers = peers
        self._receiver = receiver
        self.active = 0

    async def pull(self, job: PullJob, attachment: Attachment) -> PullOutcome:
        """Does what it can; a peer's failure is an outcome, not an exception.

        On return, with or without success or by cancellation, no transport and no thread writes the slots any more.

        Raises:
            InvalidRequest: Too many blocks, unequal counts, or a slot that is not the worker's to name or is a
                destination already.
        """
        started_s = time.monotonic()
        outcome = PullOutcome([False] * len(job.block_hashes))
        with self._destination(job, attachment) as slots:
            try:
                async with asyncio.timeout(
                    min(job.timeout_s, MAX_TIMEOUT_S) if job.timeout_s > 0 else DEFAULT_TIMEOUT_S
                ):
                    if job.holder_id in ("", self._worker_id):
                        await self._from_tiers(job, slots, outcome)
                    else:
                        await self._from_peer(job, attachment, slots, outcome)
            except TimeoutError:
                outcome.error = f"{RequestTimeout.code}: not done after {job.timeout_s:g} s"
            except TandemError as exc:
                outcome.error = f"{exc.code}: {exc.message}"
            except (TransportError, ProtocolError) as exc:
                outcome.error = f"transfer failed: {exc}"
        outcome.seconds = time.monotonic() - started_s
        return outcome

    @contextlib.contextmanager
    def _destination(self, job: PullJob, attachment: Attachment) -> Iterator[list[Block]]:
        """Claims the slots for one pull."""
        wanted = set(job.block_ids)
        if len(job.block_ids) != len(job.block_hashes) or not 0 < len(wanted) <= MAX_BLOCKS:
            raise InvalidRequest(
                f"{len(job.block_hashes)} hashes for {len(wanted)} slots; allowed are 1 to {MAX_BLOCKS}"
            )
        if len(wanted) != len(job.block_ids) or wanted & attachment.destinations:
            raise InvalidRequest("a slot is the destination of two blocks at once")
        slots = attachment.blocks(job.block_ids)
        attachment.destinations |= wanted
        self.active += 1
        try:
            yield slots
        finally:
            attachment.destinations -= wanted
            self.active -= 1

    async def _from_tiers(self, job: PullJob, slots: Sequence[Block], outcome: PullOutcome) -> None:
        copied = await self._tiers.copy_out(job.block_hashes, slots)
        outcome.verified = copied.verified
        outcome.missing, outcome.mismatched = copied.missing, copied.mismatched
        outcome.bytes = sum(slot.nbytes for slot, ok in zip(slots, copied.verified, strict=True) if ok)

    async def _from_peer(
        self, job: PullJob, attachment: Attachment, slots: Sequence[Block], outcome: PullOutcome
    ) -> None:
        holder = self._peers.resolve(job.holder_id, job.holder_incarnation, attachment.fingerprint)
        stripes = _stripes(len(slots), attachment.block_bytes, self._receiver.lanes)
        await all_or_none([self._fetch(stripe, holder, job, attachment, slots, outcome) for stripe in stripes])

    async def _fetch(
        self,
        stripe: range,
        holder: TransferRecord,
        job: PullJob,
        attachment: Attachment,
        slots: Sequence[Block],
        outcome: PullOutcome,
    ) -> None:
        """Brings some of a pull's blocks, by their indices in it."""
        request = pb.FetchRequest(
            session_id=job.session_id,
            fingerprint=attachment.fingerprint,
            incarnation=holder.incarnation,
            requester=self._worker_id,
            block_hashes=b"".join(job.block_hashes[stripe.start : stripe.stop]),
        )
        async with self._peers.stream(holder).call(request) as fetch:
            granted = await fetch.first_reply()
            available = [stripe[i] for i in _checked_indices(granted, len(stripe), attachment.block_bytes)]
            outcome.missing += len(stripe) - len(available)
            if not available:
                return
            host = _data_host(granted, holder)
            hashes = [job.block_hashes[i] for i in available]
            claims = Claims.of(
                bytes.fromhex(granted.transfer_id),
                requester=self._worker_id,
                fingerprint=attachment.fingerprint,
                block_hashes=hashes,
                block_bytes=attachment.block_bytes,
                expires_ms=granted.expires_ms,
            )
            offer = Offer(holder.incarnation, host, granted.ucx_port, claims, granted.token)
            received = await fetch.while_granted(self._receiver.receive(offer, hashes, [slots[i] for i in available]))
        outcome.bytes += attachment.block_bytes * len(available)
        outcome.verify_s += received.verify_s
        for i, is_verified, is_withdrawn in zip(available, received.verified, received.withdrawn, strict=True):
            outcome.verified[i] = is_verified
            outcome.missing += is_withdrawn
            if not is_verified and not is_withdrawn:
                outcome.mismatched += 1
                log.error(
                    "block_mismatch",
                    session_id=job.session_id,
                    holder_id=job.holder_id,
                    holder_incarnation=holder.incarnation,
                    block_hash=job.block_hashes[i].hex(),
                    block_id=job.block_ids[i],
                )


def _stripes(num_blocks: int, block_bytes: int, lanes: int) -> list[range]:
    """Runs of a pull's blocks that are fetched at the same time, one per lane where that is worth asking twice."""
    num_stripes = lanes if num_blocks * block_bytes >= STRIPED_BYTES else 1
    bounds = [num_blocks * i // num_stripes for i in range(num_stripes + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(bounds) if start < stop]


def _checked_indices(reply: pb.FetchReply, num_blocks: int, block_bytes: int) -> list[int]:
    """What the holder offers, after checks: nothing of it is believed."""
    available = list(reply.available)
    if available != sorted(set(available)) or (available and not 0 <= available[0] <= available[-1] < num_blocks):
        raise InternalError("the holder offers blocks that were not asked for")
    if available and reply.block_bytes != block_bytes:
        raise InternalError(f"the holder's blocks have {reply.block_bytes} bytes, ours {block_bytes}")
    if available and (
        len(reply.transfer_id) != 2 * TRANSFER_ID_BYTES
        or len(reply.token) != KEY_BYTES
        or reply.expires_ms < 0
        or not 0 < reply.ucx_port < 1 << 16
        or not all(char in "0123456789abcdef" for char in reply.transfer_id)
    ):
        raise InternalError("the holder's grant is malformed")
    return available


def _data_host(granted: pb.FetchReply, holder: TransferRecord) -> str:
    """Where the bytes are: on the holder's host, as the directory names it, and nowhere else.

    Raises:
        InternalError: The holder points to another host.
    """
    host = holder.fetch_address.rpartition(":")[0].strip("[]")
    if granted.ucx_host not in ("", host):
        raise InternalError(f"the holder at {host} points to {granted.ucx_host}")
    return host
