"""A worker's arena at start-up: that of the life before, with its sealed blocks, or a new one.

    files of another model or size, or none    -> new
    kv_transfer does not answer, or refuses    -> new: somebody might still write the old one
    kv_transfer says that it is quiet, and what in it matches its checksums  -> adopted

A new arena is a new file; whoever still has the old one mapped harms nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog

from protos import kv_transfer_pb2 as pb
from protos import kv_transfer_pb2_grpc as rpc
from shared.device_arena import DeviceArena
from shared.errors import ConfigurationError
from shared.identity import BlockHash, BlockId, Fingerprint, WorkerId, split_hashes
from shared.kv_arena import SharedArena
from shared.rpc import open_channel, unix_target
from shared.seal_table import SealTable, table_path

log = structlog.get_logger(__name__)

CONNECT_S = 5.0
"""kv_transfer may be starting, too."""
ASK_TIMEOUT_S = 20.0
"""kv_transfer reads the whole arena before it answers; some GB/s."""

Ask = Callable[[pb.AdoptRequest], pb.AdoptReply | None]
"""Asks kv_transfer and waits; None when there was no answer."""


@dataclass(frozen=True, slots=True)
class WorkerArena:
    """A worker's KV memory.

    Attributes:
        table: None where the memory cannot outlive the worker.
        adopted: Sealed blocks of the life before, longest sealed first.
    """

    arena: SharedArena | DeviceArena
    table: SealTable | None
    adopted: list[tuple[BlockId, BlockHash]]

    def unlink(self) -> None:
        """Removes the files."""
        if self.table is not None:
            self.table.unlink()
        self.arena.unlink()


def open_worker_arena(
    path: Path, num_blocks: int, block_bytes: int, fingerprint: Fingerprint, worker_id: WorkerId, ask: Ask
) -> WorkerArena:
    """Adopts what is there or makes it new. Blocks.

    Raises:
        ConfigurationError: A new arena is needed and there is no room for it.
    """
    try:
        arena = SharedArena.open(path, num_blocks, block_bytes)
        table = SealTable.open(table_path(path), num_blocks, block_bytes, fingerprint)
    except FileNotFoundError:
        pass
    except (ConfigurationError, OSError) as exc:
        log.info("arena_of_another_kind_replaced", reason=str(exc))
    else:
        adopted = _ask(ask, path, arena, fingerprint, worker_id)
        if adopted is not None:
            table.keep_only({block_id for block_id, _ in adopted})
            log.info("arena_adopted", blocks=len(adopted))
            return WorkerArena(arena, table, adopted)
    table_path(path).unlink(missing_ok=True)  # first: a table must never be about an arena that is not its own
    arena = SharedArena.create(path, num_blocks, block_bytes)
    return WorkerArena(arena, SealTable.create(table_path(path), num_blocks, block_bytes, fingerprint), [])


def _ask(
    ask: Ask, path: Path, arena: SharedArena, fingerprint: Fingerprint, worker_id: WorkerId
) -> list[tuple[BlockId, BlockHash]] | None:
    reply = ask(
        pb.AdoptRequest(
            worker_id=worker_id,
            fingerprint=fingerprint,
            arena_path=str(path),
            seal_table=str(table_path(path)),
            num_blocks=arena.num_blocks,
            block_bytes=arena.block_bytes,
        )
    )
    if reply is None or reply.refused:
        log.info("arena_not_adopted", reason="no answer" if reply is None else reply.refused)
        return None
    return list(zip(map(BlockId, reply.block_ids), split_hashes(reply.block_hashes), strict=True))


async def ask_kv_transfer(socket: Path, request: pb.AdoptRequest) -> pb.AdoptReply | None:
    """One Adopt call."""
    async with open_channel(unix_target(socket)) as channel:
        try:
            await asyncio.wait_for(channel.channel_ready(), CONNECT_S)
            reply: pb.AdoptReply = await rpc.KvTransferStub(channel).Adopt(request, timeout=ASK_TIMEOUT_S)
        except TimeoutError:
            log.warning("adopt_failed", status="no kv_transfer", waited_s=CONNECT_S)
            return None
        except grpc.aio.AioRpcError as exc:
            log.warning("adopt_failed", status=exc.code().name, detail=exc.details())
            return None
    return reply
