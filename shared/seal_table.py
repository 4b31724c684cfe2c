"""Which arena slot holds which sealed block, in shared memory beside the arena: it survives the worker's death.

    header    64 bytes   geometry and fingerprint
    entry     64 bytes   per slot: name, stamp, seal, checksum, checksum seal

The worker alone seals and clears entries: sealed once a block's KV is complete, cleared before its slot is given away.
A process that is killed stops between two stores, so whatever the table says then is true of the arena, and an entry
that was being written has no valid seal. kv_transfer adds a checksum to each entry; it is bound to the entry's stamp:
one which comes too late, for a block that is gone, counts for nothing.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shared.errors import ConfigurationError
from shared.identity import HASH_BYTES, BlockHash, BlockId

_MAGIC = b"TDMSEAL1"
_HEADER = struct.Struct("<8sQQ32s")  # magic, blocks, bytes of one, fingerprint
_HEADER_BYTES = 64
_ENTRY_BYTES = 64
_NAME = struct.Struct(f"<{HASH_BYTES}sQ")  # name, stamp
_ENTRY = struct.Struct(f"<{HASH_BYTES}sQQQQ")  # name, stamp, seal, checksum, checksum seal
_NUMBER = struct.Struct("<Q")
_SEAL_AT, _CHECKSUM_AT, _CHECKSUM_SEAL_AT = 24, 32, 40
_VALID = 1 << 32  # above the 32 bits of a CRC: a seal is never zero
_COLUMNS = np.dtype(
    {
        "names": ["stamp", "seal", "checksum_seal"],
        "formats": ["<u8", "<u8", "<u8"],
        "offsets": [HASH_BYTES, _SEAL_AT, _CHECKSUM_SEAL_AT],
        "itemsize": _ENTRY_BYTES,
    }
)


class SealedSlot(NamedTuple):  # made for every block of a fetch, in a fifth of a dataclass' time
    """One entry.

    Attributes:
        stamp: Order of sealing; another block in the same slot has another stamp.
        checksum: Of the block's bytes; None while nobody has computed it.
        entry: Name, stamp and seal as they stand in the table: whether they still do is one comparison.
    """

    block_id: BlockId
    name: BlockHash
    stamp: int
    checksum: int | None
    entry: bytes


class SealTable:
    """A mapping of the table's file."""

    def __init__(self, path: Path, num_blocks: int, buffer: mmap.mmap) -> None:
        self.path = path
        self.num_blocks = num_blocks
        self._buffer = buffer
        self._columns: npt.NDArray[np.void] = np.frombuffer(buffer, _COLUMNS, num_blocks, _HEADER_BYTES)
        self._stamp = int(self._columns["stamp"].max())

    @classmethod
    def create(cls, path: Path, num_blocks: int, block_bytes: int, fingerprint: str) -> SealTable:
        """Makes the file, replacing one that is there; no slot is sealed."""
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, _file_bytes(num_blocks))
            buffer = mmap.mmap(descriptor, _file_bytes(num_blocks), mmap.MAP_SHARED)
        finally:
            os.close(descriptor)
        _HEADER.pack_into(buffer, 0, _MAGIC, num_blocks, block_bytes, fingerprint.encode()[:32])
        return cls(path, num_blocks, buffer)

    @classmethod
    def open(cls, path: Path, num_blocks: int, block_bytes: int, fingerprint: str) -> SealTable:
        """Maps a table that a worker made.

        Raises:
            ConfigurationError: It is about another arena.
            FileNotFoundError: There is none.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(descriptor).st_size != _file_bytes(num_blocks):
                raise ConfigurationError(f"{path} is not about {num_blocks} blocks")
            buffer = mmap.mmap(descriptor, _file_bytes(num_blocks), mmap.MAP_SHARED)
        finally:
            os.close(descriptor)
        expected = _HEADER.pack(_MAGIC, num_blocks, block_bytes, fingerprint.encode()[:32])
        if buffer[: _HEADER.size] != expected:
            raise ConfigurationError(f"{path} is about another arena: geometry or fingerprint differ")
        return cls(path, num_blocks, buffer)

    # The worker

    def record(self, block_id: BlockId, name: BlockHash | None) -> None:
        """The slot holds the named block from now on; None = it is about to be given away."""
        at = _HEADER_BYTES + block_id * _ENTRY_BYTES
        _NUMBER.pack_into(self._buffer, at + _SEAL_AT, 0)
        if name is None:
            return
        self._stamp += 1
        entry = _NAME.pack(name, self._stamp)
        _NUMBER.pack_into(self._buffer, at + _CHECKSUM_SEAL_AT, 0)
        self._buffer[at : at + _NAME.size] = entry
        _NUMBER.pack_into(self._buffer, at + _SEAL_AT, _crc(entry, block_id))

    def keep_only(self, block_ids: set[BlockId]) -> None:
        """Clears every other slot."""
        for block_id in self._sealed_ids():
            if block_id not in block_ids:
                self.record(block_id, None)

    # kv_transfer

    def sealed(self, *, after: int = 0) -> list[SealedSlot]:
        """All valid entries with a stamp greater than `after`, in the order of sealing."""
        found = np.flatnonzero((self._columns["seal"] != 0) & (self._columns["stamp"] > after))
        slots = [slot for block_id in found if (slot := self.slot(BlockId(int(block_id)))) is not None]
        return sorted(slots, key=lambda slot: slot.stamp)

    def unchecked(self) -> list[SealedSlot]:
        """Valid entries without a checksum."""
        without = np.flatnonzero((self._columns["seal"] != 0) & (self._columns["checksum_seal"] == 0))
        slots = [self.slot(BlockId(int(block_id))) for block_id in without]
        return [slot for slot in slots if slot is not None and slot.checksum is None]

    def slot(self, block_id: BlockId) -> SealedSlot | None:
        """One entry, if it is valid."""
        at = _HEADER_BYTES + block_id * _ENTRY_BYTES
        raw = self._buffer[at : at + _ENTRY.size]
        name, stamp, seal, checksum, checksum_seal = _ENTRY.unpack(raw)
        if seal != _crc(raw[: _NAME.size], block_id):
            return None
        is_checked = checksum_seal == _crc(raw[_CHECKSUM_AT:_CHECKSUM_SEAL_AT], seal)  # goes on where the other ended
        return SealedSlot(block_id, BlockHash(name), stamp, checksum if is_checked else None, raw[:_CHECKSUM_AT])

    def holds(self, slot: SealedSlot) -> bool:
        """Whether the slot was not given away since `slot` was read: its bytes were that block's all the while."""
        at = _HEADER_BYTES + slot.block_id * _ENTRY_BYTES
        return self._buffer[at : at + _CHECKSUM_AT] == slot.entry

    def note_checksum(self, slot: SealedSlot, checksum: int) -> bool:
        """Adds what was computed from the slot's bytes after `slot` was read; False if the slot was given away since.

        The bytes were the named block's all the while, then: a slot's entry is cleared before its bytes change.
        """
        if not self.holds(slot):
            return False
        at = _HEADER_BYTES + slot.block_id * _ENTRY_BYTES
        number = _NUMBER.pack(checksum)
        self._buffer[at + _CHECKSUM_AT : at + _CHECKSUM_SEAL_AT] = number
        _NUMBER.pack_into(
            self._buffer, at + _CHECKSUM_SEAL_AT, _crc(number, _crc(_NAME.pack(slot.name, slot.stamp), slot.block_id))
        )
        return True

    def unlink(self) -> None:
        """Removes the name."""
        self.path.unlink(missing_ok=True)

    def _sealed_ids(self) -> list[BlockId]:
        return [BlockId(int(block_id)) for block_id in np.flatnonzero(self._columns["seal"])]


def table_path(arena_path: Path) -> Path:
    """Where the table of an arena is."""
    return arena_path.with_name(arena_path.name + ".seals")


def _file_bytes(num_blocks: int) -> int:
    return _HEADER_BYTES + num_blocks * _ENTRY_BYTES


def _crc(payload: bytes, begun: int) -> int:
    """Of an entry, beginning with its block id, so that no other slot's entry is valid."""
    return zlib.crc32(payload, begun & 0xFFFFFFFF) | _VALID
