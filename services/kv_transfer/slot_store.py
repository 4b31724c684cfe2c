"""Blocks of one size in the slots of one file, with an index file beside it. Blocking calls; see DISK_TIER.md.

    index   [capacity] x 64 bytes: hash, checksum, stamp, seal
    data    [capacity] x block_bytes

A slot's entry is erased before its bytes are overwritten and written after them. So a process that is killed at any
instant leaves entries of whole blocks only. What a power cut leaves (the kernel writes in an order of its own) is
caught by the checksum, which every reader compares.
"""

from __future__ import annotations

import fcntl
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import xxhash

from shared.device_arena import DeviceBlock
from shared.identity import HASH_BYTES, BlockHash
from shared.transfer.checksum import Block, HostBlock, block_checksum

_ENTRY = struct.Struct(f"<{HASH_BYTES}sQQ")  # hash, checksum, stamp
_SEAL = struct.Struct("<Q")  # xxh3-64 of the entry and its slot number
_ENTRY_BYTES = 64  # never across two pages
_SYNC_BYTES = 64 << 20  # so that a failing device is noticed, and dirty memory stays bounded


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A block in the store.

    Attributes:
        checksum: Of its bytes as they were when it was sealed.
        stamp: Order of writing.
    """

    block_hash: BlockHash
    slot: int
    checksum: int
    stamp: int


class SlotStore:
    """One directory's two files, locked against other processes.

    Slots are the caller's to assign; one slot is not read and written at once. One thread writes, any may read.
    """

    def __init__(self, directory: Path, block_bytes: int, capacity: int) -> None:
        """Opens or makes the files.

        Raises:
            OSError: The directory cannot be used, or another process uses it (BlockingIOError).
        """
        directory.mkdir(parents=True, exist_ok=True)
        self.block_bytes = block_bytes
        self.capacity = capacity
        self._unsynced_bytes = 0
        self._index = os.open(directory / "index", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._index, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._data = os.open(directory / "data", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            os.close(self._index)
            raise
        # A budget that became smaller gives its space back.
        for descriptor, size in ((self._index, capacity * _ENTRY_BYTES), (self._data, capacity * block_bytes)):
            if os.fstat(descriptor).st_size > size:
                os.ftruncate(descriptor, size)

    def load(self) -> list[StoredBlock]:
        """Every whole entry, in the order of writing; one read of 64 bytes per slot."""
        blocks = []
        raw = os.pread(self._index, self.capacity * _ENTRY_BYTES, 0)
        for slot in range(len(raw) // _ENTRY_BYTES):
            entry = raw[slot * _ENTRY_BYTES : slot * _ENTRY_BYTES + _ENTRY.size]
            (seal,) = _SEAL.unpack_from(raw, slot * _ENTRY_BYTES + _ENTRY.size)
            if seal and seal == _seal(entry, slot):
                block_hash, checksum, stamp = _ENTRY.unpack(entry)
                blocks.append(StoredBlock(BlockHash(block_hash), slot, checksum, stamp))
        return sorted(blocks, key=lambda block: block.stamp)

    def write(self, stored: StoredBlock, block: HostBlock) -> None:
        """Puts a block into its slot, over whatever is there.

        Raises:
            OSError: No space, or the device fails; the slot is then empty.
        """
        self.erase(stored.slot)
        _write_all(self._data, block, stored.slot * self.block_bytes)
        entry = _ENTRY.pack(stored.block_hash, stored.checksum, stored.stamp)
        _write_all(self._index, entry + _SEAL.pack(_seal(entry, stored.slot)), stored.slot * _ENTRY_BYTES)
        self._unsynced_bytes += block.nbytes
        if self._unsynced_bytes >= _SYNC_BYTES:
            self._unsynced_bytes = 0
            os.fdatasync(self._data)

    def erase(self, slot: int) -> None:
        """Empties a slot.

        Raises:
            OSError: The device fails.
        """
        _write_all(self._index, bytes(_ENTRY_BYTES), slot * _ENTRY_BYTES)

    def read(self, slot: int, target: Block) -> int:
        """Fills `target` from a slot and returns the checksum of what is in `target` then.

        Raises:
            OSError: The device fails.
        """
        filled, memory = 0, target.staging() if isinstance(target, DeviceBlock) else target
        while filled < target.nbytes:
            count = os.preadv(self._data, [memory.data[filled:]], slot * self.block_bytes + filled)
            if not count:
                break  # shorter than it should be: the checksum will not match
            filled += count
        if isinstance(target, DeviceBlock):
            target.write_from(memory)
        return block_checksum(target)

    def room(self) -> int:
        """Slots that the file system has space for now, beyond those that have theirs already.

        Raises:
            OSError: It does not say.
        """
        space = os.fstatvfs(self._data)
        return space.f_bavail * space.f_frsize // self.block_bytes

    def close(self) -> None:
        """Gives the files and their lock back."""
        os.close(self._data)
        os.close(self._index)


def _write_all(descriptor: int, payload: bytes | HostBlock, offset: int) -> None:
    view = memoryview(payload) if isinstance(payload, bytes) else payload.data
    while view.nbytes:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def _seal(entry: bytes, slot: int) -> int:
    return xxhash.xxh3_64_intdigest(entry, seed=slot)
