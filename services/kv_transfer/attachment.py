"""The worker that this process stands beside: its arena, and pins in its block pool."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from protos import kv_transfer_pb2 as pb
from protos import kv_transfer_pb2_grpc as rpc
from shared.errors import InvalidRequest, WorkerLost
from shared.identity import BlockHash, BlockId, Fingerprint, Incarnation, WorkerId, join_hashes
from shared.kv_arena import SharedArena
from shared.rpc import open_channel, rpc_errors, unix_target
from shared.seal_table import SealTable
from shared.transfer.checksum import Block

PIN_TIMEOUT_S = 5.0
"""The worker answers a pin between two engine steps."""


@dataclass(frozen=True, slots=True)
class WorkerPin:
    """Blocks held in the worker's pool.

    Attributes:
        blocks: Per hash its bytes in the arena, or None where the worker doesn't have it.
        checksums: Of those bytes, as far as they are known.
        lost: Done when the pin ended early: the bytes may change from then on.
    """

    blocks: list[Block | None]
    checksums: list[int | None]
    lost: asyncio.Future[None]


class Attachment:
    """One life of the worker, from its Attach call to the end of it.

    Attributes:
        table: What the worker says of its slots; None if it says nothing.
        destinations: Slots that some pull is filling now.
        sealed: Set when the worker sealed something.
        ended: Set when the worker shall go: another one took its place, or this process is about to end.
    """

    def __init__(self, request: pb.AttachRequest) -> None:
        """Maps the arena.

        Raises:
            InvalidRequest: Nonsensical geometry, or no arena of that size there.
        """
        if request.num_blocks <= 0 or request.block_bytes <= 0:
            raise InvalidRequest(f"an arena of {request.num_blocks} x {request.block_bytes} bytes")
        try:
            self.arena = SharedArena.open(Path(request.arena_path), request.num_blocks, request.block_bytes)
        except OSError as exc:
            raise InvalidRequest(f"cannot map the KV arena {request.arena_path}: {exc}") from exc
        self.table = _open_table(request)
        self.worker_id = WorkerId(request.worker_id)
        self.incarnation = Incarnation(request.incarnation)
        self.fingerprint = Fingerprint(request.fingerprint)
        self.block_bytes = int(request.block_bytes)
        self.destinations: set[int] = set()
        self.sealed = asyncio.Event()
        self.ended = asyncio.Event()
        self._channel = open_channel(unix_target(request.host_socket))
        self._host = rpc.BlockHostStub(self._channel)

    def blocks(self, block_ids: Sequence[int]) -> list[Block]:
        """The bytes of arena slots.

        Raises:
            InvalidRequest: A slot that the arena doesn't have.
        """
        views = []
        for block_id in block_ids:
            if not 0 <= block_id < self.arena.num_blocks:
                raise InvalidRequest(f"block id {block_id} of an arena of {self.arena.num_blocks} blocks")
            views.append(self.arena.blocks[block_id])
        return views

    @contextlib.asynccontextmanager
    async def pin(self, hashes: Sequence[BlockHash]) -> AsyncIterator[WorkerPin]:
        """Holds blocks in the worker's pool as long as the context is open.

        Raises:
            TandemError: The worker doesn't answer, or answers nonsense.
        """
        call = self._host.Pin(pb.PinRequest(block_hashes=join_hashes(hashes)))
        watch: asyncio.Task[None] | None = None
        try:
            reply = await _first_reply(call)
            if not isinstance(reply, pb.PinReply) or len(reply.block_ids) != len(hashes):
                raise WorkerLost("the worker ended a pin without an answer")
            held = iter(self.blocks([block_id for block_id in reply.block_ids if block_id >= 0]))
            watch = asyncio.get_running_loop().create_task(_until_ended(call))
            yield WorkerPin(
                blocks=[next(held) if block_id >= 0 else None for block_id in reply.block_ids],
                checksums=self._checksums(hashes, reply.block_ids),
                lost=watch,
            )
        finally:
            call.cancel()
            if watch is not None:
                watch.cancel()

    def watch(self, hashes: Sequence[BlockHash], block_ids: Sequence[int]) -> Callable[[BlockHash], bool]:
        """Makes a question: is this block still where it was?

        The worker keeps its blocks in place while it waits for an answer; it may have died, or stopped to wait.
        """
        table = self.table
        if table is None:
            return lambda block_hash: True
        before = {name: table.slot(BlockId(block_id)) for name, block_id in zip(hashes, block_ids, strict=True)}

        def is_unchanged(block_hash: BlockHash) -> bool:
            slot = before[block_hash]
            if slot is None or slot.name != block_hash:
                return False
            now = table.slot(slot.block_id)
            return now is not None and now.stamp == slot.stamp

        return is_unchanged

    def _checksums(self, hashes: Sequence[BlockHash], block_ids: Sequence[int]) -> list[int | None]:
        """Of pinned blocks: while they are, their entries stay."""
        if self.table is None:
            return [None] * len(hashes)
        slots = [self.table.slot(BlockId(block_id)) if block_id >= 0 else None for block_id in block_ids]
        return [
            slot.checksum if slot is not None and slot.name == block_hash else None
            for slot, block_hash in zip(slots, hashes, strict=True)
        ]

    async def close(self) -> None:
        """Ends the worker's pins; the arena stays mapped as long as a transfer still uses it."""
        self.ended.set()
        await self._channel.close()


def _open_table(request: pb.AttachRequest) -> SealTable | None:
    if not request.seal_table:
        return None
    try:
        return SealTable.open(Path(request.seal_table), request.num_blocks, request.block_bytes, request.fingerprint)
    except OSError as exc:
        raise InvalidRequest(f"cannot map {request.seal_table}: {exc}") from exc


async def _first_reply(call: grpc.aio.UnaryStreamCall[pb.PinRequest, pb.PinReply]) -> object:
    try:
        with rpc_errors():
            async with asyncio.timeout(PIN_TIMEOUT_S):
                return await call.read()
    except TimeoutError as exc:
        raise WorkerLost(f"the worker did not answer a pin within {PIN_TIMEOUT_S} s") from exc
    except asyncio.CancelledError as exc:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # Not us: the channel was closed, because the worker is gone.
        raise WorkerLost("the worker is gone") from exc


async def _until_ended(call: grpc.aio.UnaryStreamCall[pb.PinRequest, pb.PinReply]) -> None:
    with contextlib.suppress(grpc.aio.AioRpcError):
        await call.read()
