"""Host tier and disk tier as one holder of blocks: memory first, then disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from services.kv_transfer.block_copy import copy_and_checksum
from services.kv_transfer.disk_tier import DiskTier
from services.kv_transfer.host_tier import HostTier, TierBlock
from shared.identity import BlockHash, Fingerprint
from shared.transfer.checksum import Block


@dataclass(slots=True)
class Copied:
    """What became of blocks that were copied out.

    Attributes:
        verified: Per block: its bytes are in the target and were checked.
        mismatched: Blocks that turned out damaged.
    """

    verified: list[bool]
    missing: int = 0
    mismatched: int = 0


class Tiers:
    """Owned by the event loop.

    Args:
        memory_bytes, disk_bytes: Budgets; 0 = none of it.
        disk_root: Of this worker alone; None = no disk.
        executor: For copies and checksums in memory.
        on_change: Told (added, dropped) hashes of the two as one.
    """

    def __init__(
        self,
        memory_bytes: int,
        disk_bytes: int,
        disk_root: Path | None,
        executor: Executor,
        on_change: Callable[[Sequence[BlockHash], Sequence[BlockHash]], None],
    ) -> None:
        self._executor = executor
        self._on_change = on_change
        self.memory = HostTier(memory_bytes, executor, self._memory_changed)
        self.disk = DiskTier(disk_root, disk_bytes, self.memory, self._disk_changed)

    async def adopt(self, fingerprint: Fingerprint, block_bytes: int) -> None:
        """Prepares for the blocks of a worker: finds those of its kind on disk, drops others."""
        self.memory.adopt(fingerprint, block_bytes)
        await self.disk.adopt(fingerprint, block_bytes)

    async def save(
        self,
        hashes: Sequence[BlockHash],
        blocks: Sequence[Block],
        is_unchanged: Callable[[BlockHash], bool] = lambda block_hash: True,
    ) -> list[bool]:
        """Copies blocks in.

        Args:
            hashes: Of the blocks.
            blocks: Their bytes.
            is_unchanged: Asked after the copy: whether what was copied is the block.

        Returns:
            Per block whether it is here now.
        """
        is_saved = await self.memory.save(hashes, blocks, is_unchanged)
        self.disk.offer(block_hash for block_hash, here in zip(hashes, is_saved, strict=True) if here)
        return [here or block_hash in self.disk for block_hash, here in zip(hashes, is_saved, strict=True)]

    async def pin(self, hashes: Sequence[BlockHash]) -> list[TierBlock | None]:
        """Finds blocks and keeps them in memory until `unpin`; None for each that is not here or finds no room.

        What is on disk only is brought into memory first.
        """
        entries = self.memory.pin(hashes)
        absent = [h for h, entry in zip(hashes, entries, strict=True) if entry is None and h in self.disk]
        if not absent:
            return entries
        try:
            await self.memory.fill(absent, self.disk.read)
        except BaseException:
            self.memory.unpin(entries)
            raise
        self.disk.touch(reversed(absent))
        late = iter(self.memory.pin([h for h, entry in zip(hashes, entries, strict=True) if entry is None]))
        return [next(late) if entry is None else entry for entry in entries]

    def unpin(self, entries: Iterable[TierBlock | None]) -> None:
        """Lets go of what `pin` returned, each once."""
        self.memory.unpin(entries)

    async def copy_out(self, hashes: Sequence[BlockHash], targets: Sequence[Block]) -> Copied:
        """Copies blocks to where the worker wants them, those on disk without a stay in memory.

        On return, and also when cancelled, no thread writes to the targets any more.
        """
        copied = Copied([False] * len(hashes))
        entries = self.memory.pin(hashes)
        try:
            held = [(i, entry) for i, entry in enumerate(entries) if entry is not None]
            checksums = await copy_and_checksum(
                self._executor, [entry.block for _, entry in held], [targets[i] for i, _ in held], checksum_source=False
            )
        finally:
            self.memory.unpin(entries)
        for (i, entry), checksum in zip(held, checksums, strict=True):
            copied.verified[i] = checksum == entry.checksum
            if not copied.verified[i]:
                copied.mismatched += 1
                self.memory.discard_corrupt(entry.block_hash)
        await self._copy_from_disk([i for i, entry in enumerate(entries) if entry is None], hashes, targets, copied)
        return copied

    def discard_corrupt(self, block_hash: BlockHash) -> None:
        """Drops a block whose bytes in memory do not match its checksum any more."""
        self.memory.discard_corrupt(block_hash)

    async def run(self) -> None:
        """Copies to disk in the background until cancelled."""
        await self.disk.run()

    async def flush(self, timeout_s: float) -> None:
        """Gives the copying to disk this long to finish."""
        async with asyncio.timeout(timeout_s):
            await self.disk.flush()

    async def _copy_from_disk(
        self, absent: Sequence[int], hashes: Sequence[BlockHash], targets: Sequence[Block], copied: Copied
    ) -> None:
        wanted = [hashes[i] for i in absent]
        known = [block_hash in self.disk for block_hash in wanted]
        checksums = await self.disk.read(wanted, [targets[i] for i in absent])
        self.disk.touch(reversed(wanted))
        for i, checksum, was_known in zip(absent, checksums, known, strict=True):
            copied.verified[i] = checksum is not None
            if checksum is None:
                copied.mismatched += was_known
                copied.missing += not was_known

    def _memory_changed(self, added: Sequence[BlockHash], dropped: Sequence[BlockHash]) -> None:
        self._on_change(added, [block_hash for block_hash in dropped if block_hash not in self.disk])

    def _disk_changed(self, added: Sequence[BlockHash], dropped: Sequence[BlockHash]) -> None:
        self._on_change(added, [block_hash for block_hash in dropped if block_hash not in self.memory])
