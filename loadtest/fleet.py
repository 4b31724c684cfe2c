"""Every worker of a running suite, found in its directory and asked directly: what a client cannot see."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc

from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from shared.directory.client import Directory
from shared.directory.records import TransferRecord, WorkerRecord
from shared.rpc import open_channel

ASK_TIMEOUT_S = 2.0
LOOK_AGAIN_S = 0.006  # each look costs every worker some of its time


@dataclass(frozen=True, slots=True)
class Freed:
    """When every block was free.

    Attributes:
        at_s: `time.perf_counter()` when nothing was held first.
        last: Workers that held some at the look before.
    """

    at_s: float
    last: frozenset[str]


class Fleet:
    """`async with Fleet(redis_url) as fleet`: follows workers as they come and go."""

    def __init__(self, redis_url: str) -> None:
        self._directory = Directory(redis_url, heartbeat_s=0.4, watch=(WorkerRecord, TransferRecord))
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._silent: dict[str, str] = {}  # address of who did not answer: why

    async def __aenter__(self) -> Self:
        await self._directory.start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for channel in self._channels.values():
            await channel.close()
        await self._directory.close()

    def addresses(self) -> dict[str, str]:
        """Of every worker and, as `<worker>.transfer`, of every kv_transfer in the directory now."""
        transfers = {f"{record.worker_id}.transfer": record.fetch_address for record in self._directory.transfers()}
        return transfers | {record.worker_id: record.address for record in self._directory.workers()}

    async def statuses(self, *roles: str) -> list[pb.StatusReply]:
        """Of every worker, in these roles if any are named, that answers now."""
        workers = [record for record in self._directory.workers() if not roles or record.role in roles]
        replies = await asyncio.gather(*(self._ask(record.address) for record in workers))
        return [reply for reply in replies if reply is not None]

    async def running_decode_worker(self, timeout_s: float = 10.0) -> pb.StatusReply:
        """A decode worker that generates now.

        Raises:
            TimeoutError: None began in time.
        """
        async with asyncio.timeout(timeout_s):
            while True:
                asked = [self._ask(record.address) for record in self._directory.workers() if record.role == "decode"]
                for next_answer in asyncio.as_completed(asked):  # a slow worker must not hide one that runs
                    status = await next_answer
                    if status is not None and status.running:
                        return status
                await asyncio.sleep(0.002)

    async def until_free(self, timeout_s: float = 10.0) -> float:
        """Waits until no worker has a block that is neither free nor evictable; returns `time.perf_counter()` then.

        Raises:
            TimeoutError: Some still had; the message says who and how many.
        """
        return (await self.freed(timeout_s)).at_s

    async def freed(self, timeout_s: float = 10.0, *, settled_s: float = 0.0) -> Freed:
        """Waits until no worker has a block that is neither free nor evictable.

        Args:
            timeout_s: How long.
            settled_s: They must have none for so long: what is on its way to a worker is not held there yet.

        Raises:
            TimeoutError: Some still had; the message says who and how many.
        """
        deadline_s, freed, holders = time.perf_counter() + timeout_s, None, frozenset[str]()
        while True:
            held = {s.worker_id: held for s in await self.statuses() if (held := blocks_in_use(s))}
            now_s = time.perf_counter()
            if held:
                freed, holders = None, frozenset(held)
                if now_s > deadline_s:
                    raise TimeoutError(f"blocks still held after {timeout_s:g} s: {held}")
            else:
                freed = freed or Freed(now_s, holders)
                if now_s >= freed.at_s + settled_s:
                    return freed
            await asyncio.sleep(LOOK_AGAIN_S)

    async def until_ready(self, num_workers: int, timeout_s: float = 60.0) -> None:
        """Waits until so many workers are ready, e.g. after one was restarted.

        Raises:
            TimeoutError: They are not.
        """
        deadline_s = time.perf_counter() + timeout_s
        while (ready := sum(status.ready for status in await self.statuses())) < num_workers:
            if time.perf_counter() > deadline_s:
                raise TimeoutError(
                    f"{ready} of {num_workers} workers are ready after {timeout_s:g} s; the directory "
                    f"{'knows' if self._directory.healthy else 'is away and knew'} {self.addresses()}, "
                    f"no answer from {self._silent}"
                )
            await asyncio.sleep(0.05)

    async def _ask(self, address: str) -> pb.StatusReply | None:
        if address not in self._channels:
            self._channels[address] = open_channel(address)
        try:
            reply: pb.StatusReply = await rpc.WorkerStub(self._channels[address]).Status(
                pb.StatusRequest(), timeout=ASK_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as exc:
            self._silent[address] = f"{exc.code().name}: {exc.details()}"
            return None
        self._silent.pop(address, None)
        return reply


def blocks_in_use(status: pb.StatusReply) -> int:
    """Blocks that sequences, peers or unsettled transfers hold."""
    return status.blocks.used + status.blocks.pinned + status.blocks.quarantined
