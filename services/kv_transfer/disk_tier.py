"""The disk tier: copies of what the host tier holds, kept when that must let go of them, and over restarts.

    host tier -- offer --> queue -- writer thread --> slot store
    own worker's slots, host tier <-- read -- reader threads --'

Blocks are copied in the background as soon as they are in the host tier, so that eviction there waits for nothing and a
restart finds them. Every read is compared with the checksum that the block was saved with. No failure of the disk is an
error to anybody: the tier stops taking blocks, or stops altogether, says so, and what it had is recomputed.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import structlog

from services.kv_transfer.free_slots import FreeSlots
from services.kv_transfer.host_tier import HostTier, TierBlock
from services.kv_transfer.slot_store import SlotStore, StoredBlock
from services.kv_transfer.two_queue import TwoQueue
from shared.identity import BlockHash, Fingerprint
from shared.settle import settle
from shared.transfer.checksum import Block, HostBlock

log = structlog.get_logger(__name__)

RETRY_S = 30.0
"""A disk that refused a write is tried again after this long."""
LOOK_FOR_ROOM_S = 60.0
"""A disk that was full is asked for room this often."""
MAX_READ_FAILURES = 3
"""In a row; then the disk is left alone until the next start."""
_BATCH_BYTES = 16 << 20
_READERS = 2
_FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskState(Enum):
    """What the disk is good for."""

    OFF = "off"
    READ_ONLY = "read_only"
    ON = "on"


@dataclass(slots=True)
class DiskCounts:
    """Since the start, in blocks unless said otherwise.

    Attributes:
        lost: Evicted from the host tier before they were written.
        corrupt: Read back with another checksum.
        failures: Reads and writes that the disk refused.
    """

    hits: int = 0
    written: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    lost: int = 0
    corrupt: int = 0
    failures: int = 0


class DiskTier:
    """Owned by the event loop; all I/O happens in its own threads.

    Args:
        root: Of this worker alone; None = no disk.
        budget_bytes: Upper bound of the data file.
        memory: Where blocks come from.
        on_change: Told (added, dropped) hashes.
    """

    def __init__(
        self,
        root: Path | None,
        budget_bytes: int,
        memory: HostTier,
        on_change: Callable[[Sequence[BlockHash], Sequence[BlockHash]], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget_bytes = budget_bytes if root is not None else 0
        self.counts = DiskCounts()
        self._root = root
        self._memory = memory
        self._on_change = on_change
        self._clock = clock
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="disk-write")
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="disk-read")
        self._store: SlotStore | None = None
        self._kind: tuple[Fingerprint, int] | None = None
        self._index: dict[BlockHash, StoredBlock] = {}
        self._order: TwoQueue[BlockHash] = TwoQueue(0)
        self._free = FreeSlots()
        self._readings: collections.Counter[BlockHash] = collections.Counter()
        self._wanted: dict[BlockHash, None] = {}
        self._stamp = 0
        self._read_failures = 0
        self._resume_s = 0.0
        self._look_for_room_s = 0.0
        self._adopting = asyncio.Lock()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, block_hash: object) -> bool:
        return block_hash in self._index

    @property
    def state(self) -> DiskState:
        """Whether blocks are read and taken in."""
        if self._store is None:
            return DiskState.OFF
        return DiskState.READ_ONLY if self._clock() < self._resume_s else DiskState.ON

    @property
    def used_bytes(self) -> int:
        """Held by blocks in the index."""
        return len(self._index) * (self._store.block_bytes if self._store else 0)

    # Life

    async def adopt(self, fingerprint: Fingerprint, block_bytes: int) -> None:
        """Opens the store of one kind of blocks, with what an earlier life left in it; other kinds are deleted.

        Cancelled, it goes through with it all the same: the next worker of this kind finds the store open.
        """
        if self._root is not None and self.budget_bytes:
            await settle(self._adopt(self._root, fingerprint, block_bytes))

    async def _adopt(self, root: Path, fingerprint: Fingerprint, block_bytes: int) -> None:
        async with self._adopting:  # another worker may take the first one's place meanwhile
            if self._kind != (fingerprint, block_bytes):
                await self._close_store()
                self._kind = (fingerprint, block_bytes)
                await self._open(root, fingerprint, block_bytes)

    async def _open(self, root: Path, fingerprint: Fingerprint, block_bytes: int) -> None:
        started_s = time.monotonic()
        capacity = self.budget_bytes // block_bytes
        loop = asyncio.get_running_loop()
        try:
            store, blocks = await loop.run_in_executor(
                self._writer, _open_store, root, fingerprint, block_bytes, capacity
            )
        except OSError as exc:
            log.error("disk_tier_off", path=str(root), error=str(exc))
            return
        self._store = store
        self._order = TwoQueue(capacity)
        for stored in blocks:
            if (older := self._index.pop(stored.block_hash, None)) is not None:
                self._order.remove(older.block_hash)
            self._index[stored.block_hash] = stored
            self._order.add(stored.block_hash)
        taken = {stored.slot for stored in self._index.values()}
        self._free = FreeSlots(slot for slot in range(capacity) if slot not in taken)
        self._stamp = blocks[-1].stamp if blocks else 0
        self._on_change(list(self._index), [])
        log.info(
            "disk_tier_open", blocks=len(blocks), capacity=capacity, seconds=round(time.monotonic() - started_s, 3)
        )

    async def run(self) -> None:
        """Copies offered blocks until cancelled."""
        while True:
            await self._wake.wait()
            if not self._wanted:
                self._wake.clear()
                self._idle.set()
                continue
            await self._find_room()
            if self._wanted:
                await settle(self._write_some())

    async def flush(self) -> None:
        """Waits until everything offered is on disk or given up."""
        await self._idle.wait()

    async def close(self) -> None:
        """Closes the files; call it after `run` ended."""
        await self._close_store()
        self._writer.shutdown(wait=False)
        self._readers.shutdown(wait=False)

    async def _close_store(self) -> None:
        store, self._store = self._store, None
        self._wanted.clear()
        self._forget(list(self._index))
        if store is not None:
            while self._readings:  # noqa: ASYNC110 - a handful of reads, milliseconds each
                await asyncio.sleep(0.005)
            await asyncio.get_running_loop().run_in_executor(self._writer, store.close)

    # Taking in

    def offer(self, hashes: Iterable[BlockHash]) -> None:
        """The host tier has these: they will be copied when their turn comes."""
        if self.state is not DiskState.ON:
            return
        for block_hash in hashes:
            if block_hash in self._index:
                self._order.touch(block_hash)
            else:
                self._wanted[block_hash] = None
        if self._wanted:
            self._idle.clear()
            self._wake.set()

    async def _write_some(self) -> None:
        store = self._store
        assert store is not None
        batch: list[tuple[StoredBlock, TierBlock]] = []
        while self._wanted and len(batch) * store.block_bytes < _BATCH_BYTES:
            block_hash = next(iter(self._wanted))
            del self._wanted[block_hash]
            entry = self._memory.hold(block_hash)
            if entry is None:
                self.counts.lost += 1
            elif (slot := self._take_slot()) is None:
                self._memory.unpin([entry])
            else:
                self._stamp += 1
                batch.append((StoredBlock(block_hash, slot, entry.checksum, self._stamp), entry))
        written, error = 0, None
        try:
            blocks = [(stored, entry.block) for stored, entry in batch]
            work = asyncio.get_running_loop().run_in_executor(self._writer, _write_all, store, blocks)
            written, error = await work
        finally:
            self._memory.unpin(entry for _, entry in batch)
            self._written([stored for stored, _ in batch], written, store)
        if error is not None and store is self._store:
            self._refused(error)

    def _written(self, batch: Sequence[StoredBlock], count: int, store: SlotStore) -> None:
        if store is not self._store:
            return  # another model's blocks by now
        self._free.give(stored.slot for stored in batch[count:])
        for stored in batch[:count]:
            self._index[stored.block_hash] = stored
            self._order.add(stored.block_hash)
        self.counts.written += count
        self.counts.written_bytes += count * store.block_bytes
        self._on_change([stored.block_hash for stored in batch[:count]], [])

    def _take_slot(self) -> int | None:
        if not self._free:
            victim = self._order.evict(lambda block_hash: not self._readings[block_hash])
            if victim is None:
                return None
            self._free.give([self._index.pop(victim).slot])
            self._on_change([], [victim])
        return self._free.take()

    def _refused(self, error: OSError) -> None:
        self.counts.failures += 1
        self._resume_s = self._clock() + RETRY_S
        self._wanted.clear()
        if is_full := error.errno in _FULL:  # until there is room, with the slots that have their space already
            self._free.set_aside()
            self._order.capacity = len(self._index)
            self._look_for_room_s = self._clock() + LOOK_FOR_ROOM_S
        what = "disk_tier_full" if is_full else "disk_tier_write_failed"
        log.error(what, path=str(self._root), error=str(error), retry_s=RETRY_S)

    async def _find_room(self) -> None:
        """Now and then after the disk was full: takes up again what it has room for."""
        store = self._store
        if store is None or not self._free.num_without_room or self._clock() < self._look_for_room_s:
            return
        self._look_for_room_s = self._clock() + LOOK_FOR_ROOM_S
        try:
            room = await asyncio.get_running_loop().run_in_executor(self._writer, store.room)
        except OSError as exc:
            log.warning("disk_room_unknown", path=str(self._root), error=str(exc))
            return
        if store is self._store:
            self._free.take_back(room)
            self._order.capacity = store.capacity - self._free.num_without_room

    # Giving out

    async def read(self, hashes: Sequence[BlockHash], targets: Sequence[Block]) -> list[int | None]:
        """Fills `targets` with the blocks named and checks them.

        On return, and also when cancelled, no thread writes to the targets any more.

        Returns:
            Per block its checksum, or None where the target has not got it: not here, damaged, or refused.
        """
        found = [self._index.get(block_hash) for block_hash in hashes]
        store = self._store
        if store is None or not any(found):
            return [None] * len(hashes)
        wanted = [(stored, target) for stored, target in zip(found, targets, strict=True) if stored is not None]
        with self._reading([stored.block_hash for stored, _ in wanted]):
            loop = asyncio.get_running_loop()
            halves = [wanted[i::_READERS] for i in range(_READERS)]
            works = [loop.run_in_executor(self._readers, _read_all, store, half) for half in halves if half]
            results = [result for work in await settle(asyncio.gather(*works)) for result in work]
        good = self._check(results)
        return [stored.checksum if stored and stored.block_hash in good else None for stored in found]

    def touch(self, hashes: Iterable[BlockHash]) -> None:
        """These were used; call it with a prompt's first block last, because that one is worth the most."""
        for block_hash in hashes:
            if block_hash in self._index:
                self._order.touch(block_hash)

    def _check(self, results: Sequence[tuple[StoredBlock, int | OSError]]) -> set[BlockHash]:
        good: set[BlockHash] = set()
        for stored, checksum in results:
            if isinstance(checksum, OSError):
                self._read_failed(stored, checksum)
                continue
            self._read_failures = 0
            if checksum == stored.checksum:
                good.add(stored.block_hash)
                self.counts.hits += 1
                self.counts.read_bytes += self._store.block_bytes if self._store else 0
            else:
                self.counts.corrupt += 1
                log.error("disk_block_corrupt", block_hash=stored.block_hash.hex(), slot=stored.slot)
                self._forget([stored.block_hash], only=stored)
        return good

    def _read_failed(self, stored: StoredBlock, error: OSError) -> None:
        self.counts.failures += 1
        self._read_failures += 1
        log.error("disk_read_failed", block_hash=stored.block_hash.hex(), slot=stored.slot, error=str(error))
        self._forget([stored.block_hash], only=stored)
        if self._read_failures >= MAX_READ_FAILURES and self._store is not None:
            log.error("disk_tier_off", path=str(self._root), error=f"{self._read_failures} reads failed in a row")
            self._store = None
            self._wanted.clear()
            self._forget(list(self._index))

    def _forget(self, hashes: Sequence[BlockHash], only: StoredBlock | None = None) -> None:
        """Drops blocks from the index; their slots are written again some day."""
        dropped = [h for h in hashes if h in self._index and only in (None, self._index[h])]
        for block_hash in dropped:
            self._free.give([self._index.pop(block_hash).slot])
            self._order.remove(block_hash)
        if dropped:
            self._on_change([], dropped)

    @contextlib.contextmanager
    def _reading(self, hashes: Sequence[BlockHash]) -> Iterator[None]:
        """Keeps the slots of these blocks from being written meanwhile."""
        self._readings.update(hashes)
        try:
            yield
        finally:
            for block_hash in hashes:
                self._readings[block_hash] -= 1
                if not self._readings[block_hash]:
                    del self._readings[block_hash]


def _open_store(
    root: Path, fingerprint: Fingerprint, block_bytes: int, capacity: int
) -> tuple[SlotStore, list[StoredBlock]]:
    """Opens one kind's store and deletes the others'."""
    directory = root / f"{fingerprint}-{block_bytes}"
    root.mkdir(parents=True, exist_ok=True)
    for other in root.iterdir():
        if other != directory and (other / "index").exists():
            shutil.rmtree(other, ignore_errors=True)
    store = SlotStore(directory, block_bytes, capacity)
    return store, store.load()


def _write_all(store: SlotStore, blocks: Sequence[tuple[StoredBlock, HostBlock]]) -> tuple[int, OSError | None]:
    """Writes until something fails; returns how many were written, and the failure."""
    for count, (stored, block) in enumerate(blocks):
        try:
            store.write(stored, block)
        except OSError as exc:
            return count, exc
    return len(blocks), None


def _read_all(store: SlotStore, wanted: Sequence[tuple[StoredBlock, Block]]) -> list[tuple[StoredBlock, int | OSError]]:
    results: list[tuple[StoredBlock, int | OSError]] = []
    for stored, target in wanted:
        try:
            results.append((stored, store.read(stored.slot, target)))
        except OSError as exc:
            results.append((stored, exc))
    return results
