"""The worker that this process stands beside: its arena, and pins in its block pool."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from protos import kv_transfer_pb2 as pb
from protos import kv_transfer_pb2_grpc as rpc
from services.kv_transfer.seal_index import SealIndex
from shared.cancellation import is_being_cancelled
from shared.device_arena import DeviceArena
from shared.errors import ConfigurationError, InvalidRequest, WorkerLost
from shared.identity import BlockHash, BlockId, Fingerprint, Incarnation, WorkerId, join_hashes
from shared.kv_arena import SharedArena
from shared.rpc import open_channel, rpc_errors, unix_target
from shared.seal_table import SealedSlot, SealTable
from shared.transfer.checksum import Block
from shared.transfer.grants import Source

PIN_AFTER_S = 0.003
"""To call the worker takes time that the peer, who waits for the grant and the first blocks, need not wait for."""
PIN_TIMEOUT_S = 5.0
"""The worker answers a pin between two engine steps."""


UNPINNED_BYTES = 16 << 20
"""So much is sent within milliseconds: what a table names is looked at once more afterwards, and not pinned."""


@dataclass(frozen=True, slots=True)
class WorkerPin:
    """Blocks in the worker's arena.

    Attributes:
        sources: Per hash; None where the worker doesn't have it.
        lost: Done when the pin ended early: the bytes may change from then on. None: `is_intact` alone tells.
    """

    sources: list[Source | None]
    lost: asyncio.Future[None] | None


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
        self.arena = _open_arena(request)
        self.table = _open_table(request)
        self._index = None if self.table is None else SealIndex(self.table)
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

    @property
    def shared_arena(self) -> SharedArena:
        """The arena of a worker that has a table: it is in host memory."""
        assert isinstance(self.arena, SharedArena), "a table is of an arena in shared memory"
        return self.arena

    @contextlib.asynccontextmanager
    async def pin(self, hashes: Sequence[BlockHash]) -> AsyncIterator[WorkerPin]:
        """Finds blocks in the worker's pool and holds them there as long as the context is open.

        Where the worker keeps a table, its answer is not waited for: what it gives away until then is seen afterwards.

        Raises:
            TandemError: The worker doesn't answer, or answers nonsense.
        """
        if self._index is not None:
            with self._pinned_soon(hashes):
                yield WorkerPin(self._found(self._index.find(hashes)), None)
            return
        call = self._host.Pin(pb.PinRequest(block_hashes=join_hashes(hashes)))
        watch: asyncio.Task[None] | None = None
        try:
            reply = await _first_reply(call)
            if not isinstance(reply, pb.PinReply) or len(reply.block_ids) != len(hashes):
                raise WorkerLost("the worker ended a pin without an answer")
            watch = asyncio.get_running_loop().create_task(_until_ended(call))
            yield WorkerPin(self._held(hashes, reply.block_ids), watch)
        finally:
            call.cancel()
            if watch is not None:
                watch.cancel()

    @contextlib.contextmanager
    def _pinned_soon(self, hashes: Sequence[BlockHash]) -> Iterator[None]:
        """Asks the worker to keep blocks, unless they are sent before it could answer."""
        if len(hashes) * self.block_bytes <= UNPINNED_BYTES:
            yield
            return
        calls: list[grpc.aio.UnaryStreamCall[pb.PinRequest, pb.PinReply]] = []
        asking = asyncio.get_running_loop().call_later(
            PIN_AFTER_S, lambda: calls.append(self._host.Pin(pb.PinRequest(block_hashes=join_hashes(hashes))))
        )
        try:
            yield
        finally:
            asking.cancel()
            for call in calls:
                call.cancel()

    def watch(self, hashes: Sequence[BlockHash], block_ids: Sequence[int]) -> Callable[[BlockHash], bool]:
        """Makes a question: is this block still where it was?

        The worker keeps its blocks in place while it waits for an answer; it may have died, or stopped to wait. Memory
        without a table is a device's and goes with the worker: what was copied as it ended does not count.
        """
        table = self.table
        if table is None:
            return lambda block_hash: not self.ended.is_set()
        before = {name: table.slot(BlockId(block_id)) for name, block_id in zip(hashes, block_ids, strict=True)}

        def is_unchanged(block_hash: BlockHash) -> bool:
            slot = before[block_hash]
            if slot is None or slot.name != block_hash:
                return False
            return table.holds(slot)

        return is_unchanged

    def _found(self, slots: Sequence[SealedSlot | None]) -> list[Source | None]:
        """Blocks that the table names."""
        assert self.table is not None
        return slot_sources(self.shared_arena, self.table, slots)

    def _held(self, hashes: Sequence[BlockHash], block_ids: Sequence[int]) -> list[Source | None]:
        """Pinned blocks of a worker without a table."""
        pinned = iter(self.blocks([block_id for block_id in block_ids if block_id >= 0]))
        return [
            None if block_id < 0 else Source(block_hash, next(pinned), is_suspect=False)
            for block_hash, block_id in zip(hashes, block_ids, strict=True)
        ]

    async def close(self) -> None:
        """Ends the worker's pins; the arena stays mapped as long as a transfer still uses it."""
        self.ended.set()
        await self._channel.close()


def slot_sources(arena: SharedArena, table: SealTable, slots: Sequence[SealedSlot | None]) -> list[Source | None]:
    """The blocks of a table's entries: intact as long as the slot holds them, for so long their bytes don't change."""
    blocks, holds = arena.blocks, table.holds
    return [
        None
        if slot is None
        else Source(slot.name, blocks[slot.block_id], slot.checksum, False, functools.partial(holds, slot))
        for slot in slots
    ]


def _open_arena(request: pb.AttachRequest) -> SharedArena | DeviceArena:
    try:
        if request.device_handle:
            return DeviceArena.open(
                request.device_handle,
                request.device_offset,
                request.num_blocks,
                request.block_bytes,
                request.checksum_kernels,
            )
        return SharedArena.open(Path(request.arena_path), request.num_blocks, request.block_bytes)
    except (OSError, ConfigurationError) as exc:
        raise InvalidRequest(f"cannot map the KV arena {request.arena_path or 'on the device'}: {exc}") from exc


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
        if is_being_cancelled():
            raise
        # Not us: the channel was closed, because the worker is gone.
        raise WorkerLost("the worker is gone") from exc


async def _until_ended(call: grpc.aio.UnaryStreamCall[pb.PinRequest, pb.PinReply]) -> None:
    with contextlib.suppress(grpc.aio.AioRpcError):
        await call.read()
