"""The KV directory as a service uses it.

    async with Directory("redis://127.0.0.1:6379/0") as directory:
        await directory.announce(lambda: my_record)          # alive for three heartbeats, rewritten each
        directory.workers()                                  # last-known snapshot, no I/O
        matches = await directory.find_holders(hashes)       # at most 50 ms, no exception

With Redis down, slow or flushed nothing here raises: snapshots stay as last known, lookups find nothing, holders
publish again by themselves when Redis is back.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Self

import structlog

from shared.directory.hints import PrefixCount, hint_key
from shared.directory.holder import Holder
from shared.directory.membership import Membership
from shared.directory.records import GatewayRecord, Record, RecordType, TransferRecord, WorkerRecord
from shared.directory.store import RedisStore, StoreDown
from shared.identity import BlockHash, Incarnation

_log = structlog.get_logger(__name__)

_FIRST_LOOKUP_BLOCKS = 16
"""Most prompts that nobody has are known by these: packing hundreds of keys costs more than a second round trip."""
_LOOKUP_BLOCKS = 512
_BEATS_PER_HEARTBEAT = 2


@dataclass(frozen=True, slots=True)
class HolderMatch:
    """A live kv_transfer that probably has the first `num_blocks` blocks of a prompt."""

    transfer: TransferRecord
    num_blocks: int


class Directory:
    """One process's connection to the directory; owned by one event loop."""

    def __init__(
        self,
        redis_url: str,
        *,
        heartbeat_s: float = 1.0,
        lookup_timeout_s: float = 0.05,
        background_timeout_s: float = 1.0,
        watch: Collection[RecordType] = (WorkerRecord, TransferRecord, GatewayRecord),
    ) -> None:
        """Connects to nothing yet.

        Args:
            redis_url: See `RedisStore`.
            heartbeat_s: Records live for three of them; snapshots are refreshed twice in each.
            lookup_timeout_s: What a request may lose to Redis at most, and at most once a second.
            background_timeout_s: For heartbeats and publishing.
            watch: The kinds of records to keep a snapshot of; the others cost nothing.

        Raises:
            ConfigurationError: `redis_url` is malformed.
        """
        self._store = RedisStore(
            redis_url, lookup_timeout_s=lookup_timeout_s, background_timeout_s=background_timeout_s
        )
        self._membership = Membership(self._store, heartbeat_s=heartbeat_s, watch=watch)
        self._beat_s = heartbeat_s / _BEATS_PER_HEARTBEAT
        self._holder: Holder | None = None
        self._has_beaten = False
        self._beating = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._beats_soon: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Reads the first snapshot if Redis answers, and starts the heartbeat."""
        await self._beat()
        self._tasks.append(asyncio.create_task(self._run(), name="directory-heartbeat"))

    async def close(self) -> None:
        """Leaves: withdraws records, revokes hints, closes connections. Idempotent; never raises."""
        tasks, self._tasks = [*self._tasks, *self._beats_soon], []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.withdraw()
        if self._holder is not None:
            await self._holder.leave()
            self._holder = None
        await self._store.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def healthy(self) -> bool:
        """Redis answers, and in time."""
        return self._has_beaten and not self._store.is_down

    def workers(self) -> tuple[WorkerRecord, ...]:
        """Last-known workers."""
        return self._membership.records(WorkerRecord)

    def transfers(self) -> tuple[TransferRecord, ...]:
        """Last-known kv_transfers."""
        return self._membership.records(TransferRecord)

    def gateways(self) -> tuple[GatewayRecord, ...]:
        """Last-known gateways."""
        return self._membership.records(GatewayRecord)

    async def wait_for_change(self) -> None:
        """Returns when any watched record appeared, changed (load included) or left."""
        await self._membership.wait_for_change()

    async def announce(self, current: Callable[[], Record]) -> None:
        """Announces a record now and at each heartbeat, with the value that `current()` has then."""
        await self._membership.announce(current)

    async def heartbeat_now(self) -> None:
        """Writes the announced records now, e.g. because draining began."""
        await self._membership.heartbeat_now()

    def heartbeat_soon(self) -> None:
        """The same, for a caller that does not wait: something changed that others need not learn a heartbeat later."""
        task = asyncio.create_task(self.heartbeat_now())
        self._beats_soon.add(task)
        task.add_done_callback(self._beats_soon.discard)

    async def withdraw(self) -> None:
        """Removes the announced records; `close` does too."""
        await self._membership.withdraw()

    async def claim_holder(self, incarnation: Incarnation, blocks: Callable[[], Iterable[BlockHash]]) -> Holder:
        """Makes this process a holder of blocks; at most one per `Directory`.

        Args:
            incarnation: Of this process.
            blocks: All block hashes held now; called on the event loop whenever everything must be published: at
                first, after Redis lost its data, and every 20 minutes.

        Returns:
            The holder; its `index` is set as soon as Redis answers, and belongs in the `TransferRecord`.
        """
        if self._holder is not None:
            raise ValueError("this process is a holder already")
        self._holder = Holder(self._store, incarnation, blocks)
        self._tasks.append(asyncio.create_task(self._holder.run(), name="directory-publisher"))
        await self._beat()
        return self._holder

    async def longest_prefixes(self, hashes: Iterable[BlockHash]) -> dict[int, int]:
        """Holder index to the number of leading blocks of `hashes` that it probably has; {} where Redis is down.

        Includes holders that died lately; `find_holders` doesn't. Of `hashes` it takes no more than it has to look at,
        and no more than some hundreds at a time.
        """
        count, rest, num_blocks = PrefixCount(), iter(hashes), _FIRST_LOOKUP_BLOCKS
        while not count.is_over and (keys := [hint_key(h) for h in islice(rest, num_blocks)]):
            bitmaps = await self._store.lookup(keys)
            if bitmaps is None:
                break
            count.extend(bitmaps)
            num_blocks = _LOOKUP_BLOCKS
        return count.finish()

    async def find_holders(self, hashes: Sequence[BlockHash]) -> list[HolderMatch]:
        """Live holders of a prefix of `hashes`, longest first."""
        lengths = await self.longest_prefixes(hashes)
        if not lengths:
            return []
        matches = [
            HolderMatch(transfer, lengths[transfer.holder_index])
            for transfer in self.transfers()
            if transfer.holder_index in lengths
        ]
        return sorted(matches, key=lambda match: (-match.num_blocks, match.transfer.worker_id))

    async def _run(self) -> None:
        while True:
            # Jitter: processes that started together spread their load on Redis.
            await asyncio.sleep(self._beat_s * random.uniform(0.9, 1.1))
            try:
                await self._beat()
            except Exception:
                # A defect in a callback of the owner; a heartbeat that stopped would take the process out of the fleet.
                _log.exception("heartbeat_failed")

    async def _beat(self) -> None:
        async with self._beating:
            try:
                generation = await self._membership.beat()
                if self._holder is not None:
                    await self._holder.beat(generation)
            except StoreDown:
                return
            self._has_beaten = True
