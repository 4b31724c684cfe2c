"""The worker's side of the Unix socket to its kv_transfer: attach, pull, save, publish.

The link is a task that keeps one `Attach` call open and re-opens it for ever. kv_transfer may die at any time: the
worker and its KV are unharmed, pulls fail, and when the next incarnation answers, everything sealed is published again.

A pull whose reply never came leaves slots that UCX might still write. They are quarantined until kv_transfer says that
the pull is over: this incarnation because it ended it, or the next one because it holds an exclusive lock on the
socket, so that the old process, and with it its UCX, is gone.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog

from protos import kv_transfer_pb2 as pb
from protos import kv_transfer_pb2_grpc as rpc
from shared.device_arena import DeviceArena
from shared.errors import TandemError, Unavailable
from shared.identity import BlockHash, BlockId, Incarnation, WorkerId, join_hashes
from shared.kv_arena import SharedArena
from shared.rpc import open_channel, unix_target
from shared.worker.pull_stream import PullStream

log = structlog.get_logger(__name__)

RECONNECT_S = 0.05
_RATE_SMOOTHING = 0.2
_RATE_MIN_BYTES = 64 << 10  # smaller pulls measure latency, not bandwidth


class SidecarLost(Unavailable):
    """kv_transfer did not answer; whatever it was asked to write may still be written."""

    code = "kv_transfer_lost"


@dataclass(frozen=True, slots=True)
class Pull:
    """Bring sealed blocks into arena slots.

    Attributes:
        holder_id: Worker whose kv_transfer is asked; "" = the own host tier.
        block_ids: Destination slots, one per hash.
    """

    session_id: str
    holder_id: str
    holder_incarnation: str
    block_hashes: Sequence[BlockHash]
    block_ids: Sequence[BlockId]


class SidecarLink:
    """One worker's connection to its kv_transfer. All methods run on the event loop.

    Args:
        sealed_hashes: Everything the pool has sealed now; published whole after each attach.
        on_quiet: Called with the slots of pulls that were never answered, once no transport writes them any more.
        on_change: Called when kv_transfer answers again or no more.
    """

    def __init__(
        self,
        socket: Path,
        attach: pb.AttachRequest,
        *,
        pull_timeout_s: float,
        sealed_hashes: Callable[[], list[BlockHash]],
        on_quiet: Callable[[list[BlockId]], None],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._attach = attach
        self._pull_timeout_s = pull_timeout_s
        self._sealed_hashes = sealed_hashes
        self._on_quiet = on_quiet
        self._on_change = on_change
        self._channel = open_channel(unix_target(socket))
        self._stub = rpc.KvTransferStub(self._channel)
        self._attached = asyncio.Event()
        self._incarnation: Incarnation | None = None
        self._pulls: PullStream | None = None
        self._unanswered: dict[int, list[BlockId]] = {}
        self._lost_one = asyncio.Event()
        self._pull_ids = itertools.count(1)
        self._pending: dict[BlockHash, bool] = {}  # True = sealed, False = evicted; the last word wins
        self._pending_event = asyncio.Event()
        self.bytes_per_s = 0.0

    @property
    def is_attached(self) -> bool:
        """kv_transfer answers."""
        return self._attached.is_set()

    @property
    def incarnation(self) -> Incarnation | None:
        """Of the kv_transfer that attached last."""
        return self._incarnation

    async def wait_attached(self) -> None:
        """Returns once kv_transfer answers."""
        await self._attached.wait()

    async def run(self) -> None:
        """Keeps the link up until cancelled."""
        while True:
            try:
                await self._stay_attached()
            except grpc.aio.AioRpcError as exc:
                if self._attached.is_set():
                    log.warning("kv_transfer_detached", status=exc.code().name, detail=exc.details())
            if self._attached.is_set():
                self._attached.clear()
                self._on_change()
            await asyncio.sleep(RECONNECT_S)

    async def close(self) -> None:
        """Ends the channel; pending calls fail."""
        await self._channel.close()

    async def pull(self, pull: Pull) -> pb.PullReply:
        """Asks for blocks. On return no transport writes the destination slots any more.

        Raises:
            SidecarLost: No reply; the caller quarantines the slots, `on_quiet` frees them.
        """
        request = pb.PullRequest(
            session_id=pull.session_id,
            holder_id=pull.holder_id,
            holder_incarnation=pull.holder_incarnation,
            block_hashes=join_hashes(pull.block_hashes),
            block_ids=pull.block_ids,
            timeout_s=self._pull_timeout_s,
            pull_id=next(self._pull_ids),
        )
        try:
            # kv_transfer enforces the deadline itself, since only it can close the endpoint; ours is for its death.
            async with asyncio.timeout(2 * self._pull_timeout_s + 5):
                reply = await self._answer(request)
        except (TandemError, TimeoutError) as exc:
            self._unanswered[request.pull_id] = list(pull.block_ids)
            self._lost_one.set()
            raise SidecarLost(f"kv_transfer: {exc or 'no answer'}") from exc
        if pull.holder_id and reply.bytes >= _RATE_MIN_BYTES and reply.seconds > 0:
            rate = reply.bytes / reply.seconds
            self.bytes_per_s += (rate - self.bytes_per_s) * (_RATE_SMOOTHING if self.bytes_per_s else 1.0)
        return reply

    async def _answer(self, request: pb.PullRequest) -> pb.PullReply:
        if self._pulls is None:
            raise SidecarLost("kv_transfer is not attached")
        return await self._pulls.pull(request)

    async def save(self, block_hashes: Sequence[BlockHash], block_ids: Sequence[BlockId]) -> list[bool]:
        """Offers sealed, pinned blocks to the host tier; False for each one that it did not take."""
        if not self.is_attached:
            return [False] * len(block_ids)
        request = pb.SaveRequest(block_hashes=join_hashes(block_hashes), block_ids=block_ids)
        try:
            reply: pb.SaveReply = await self._stub.Save(request, timeout=self._pull_timeout_s)
        except grpc.aio.AioRpcError as exc:
            log.warning("save_failed", blocks=len(block_ids), status=exc.code().name)
            return [False] * len(block_ids)
        return list(reply.saved)

    def publish(self, sealed: Sequence[BlockHash], evicted: Sequence[BlockHash]) -> None:
        """Notes what changed; the link sends it when it can, off the step's path."""
        for block_hash in evicted:
            self._pending[block_hash] = False
        for block_hash in sealed:
            self._pending[block_hash] = True
        if self._pending:
            self._pending_event.set()

    async def _stay_attached(self) -> None:
        call = self._stub.Attach(self._attach, wait_for_ready=True)
        async for attached in call:
            incarnation = Incarnation(attached.transfer_incarnation)
            self._incarnation = incarnation
            self._attached.set()
            log.info("kv_transfer_attached", incarnation=incarnation, tier_blocks=attached.tier_blocks)
            self._on_change()
            self._pulls = PullStream(self._stub)
            beside = [asyncio.create_task(work) for work in (self._publish_until_cancelled(), self._prove_ends())]
            try:
                async for _ in call:
                    pass
            finally:
                self._pulls.retire()  # kv_transfer may still end those that it has begun
                self._pulls = None
                for task in beside:
                    task.cancel()

    async def _prove_ends(self) -> None:
        """Has the end of each pull that was lost sight of proven, then gives its slots back."""
        while True:
            lost = dict(self._unanswered)
            if not lost:
                self._lost_one.clear()
                await self._lost_one.wait()
                continue
            try:
                await self._stub.EndPulls(pb.EndPullsRequest(pull_ids=lost), timeout=self._pull_timeout_s)
            except grpc.aio.AioRpcError as exc:
                log.warning("ends_not_proven", pulls=len(lost), status=exc.code().name, detail=exc.details())
                await asyncio.sleep(RECONNECT_S)
                continue
            for pull_id, block_ids in lost.items():
                del self._unanswered[pull_id]
                self._on_quiet(block_ids)
            log.info("quarantine_released", pulls=len(lost), blocks=sum(map(len, lost.values())))

    async def _publish_until_cancelled(self) -> None:
        call = self._stub.Publish()
        try:
            self._pending.clear()
            await call.write(pb.BlockEvents(reset=True, sealed=join_hashes(self._sealed_hashes())))
            while True:
                await self._pending_event.wait()
                self._pending_event.clear()
                pending, self._pending = self._pending, {}
                await call.write(
                    pb.BlockEvents(
                        sealed=join_hashes(h for h, is_sealed in pending.items() if is_sealed),
                        evicted=join_hashes(h for h, is_sealed in pending.items() if not is_sealed),
                    )
                )
        except grpc.aio.AioRpcError as exc:
            log.warning("publish_ended", status=exc.code().name)
        except asyncio.InvalidStateError:
            log.warning("publish_ended", status="before a write")
        finally:
            call.cancel()


def attach_request(
    *,
    worker_id: WorkerId,
    incarnation: Incarnation,
    fingerprint: str,
    arena: SharedArena | DeviceArena,
    seal_table: Path | None,
    host_socket: Path,
    role: str,
) -> pb.AttachRequest:
    """What kv_transfer must know of its worker."""
    return pb.AttachRequest(
        worker_id=worker_id,
        incarnation=incarnation,
        fingerprint=fingerprint,
        arena_path=str(arena.path or ""),
        device_handle=arena.handle if isinstance(arena, DeviceArena) else b"",
        device_offset=arena.offset if isinstance(arena, DeviceArena) else 0,
        checksum_kernels=arena.checksum_kernels if isinstance(arena, DeviceArena) else None,
        seal_table=str(seal_table or ""),
        num_blocks=arena.num_blocks,
        block_bytes=arena.block_bytes,
        host_socket=str(host_socket),
        role=role,
    )
