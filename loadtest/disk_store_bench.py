"""Stores for KV blocks on disk, side by side: `python -m loadtest.disk_store_bench --directory /where/the/disk/is`.

Our slot store beside append-only segments (a sketch of one), LMDB and RocksDB with blob files, each where its package
is installed (`pip install lmdb rocksdict`). For each block size: fill to capacity, overwrite 1.5 times with eviction in
order of age, read half of what is left in random order. The page cache is in play, as in service.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from services.kv_transfer.slot_store import SlotStore, StoredBlock
from shared.identity import BlockHash
from shared.transfer.checksum import Block, block_checksum


class Store(Protocol):
    """Put replaces the oldest value when the store is full."""

    def put(self, key: bytes, value: Block) -> None: ...

    def get(self, key: bytes, target: Block) -> None: ...


class Slots:
    """Ours."""

    def __init__(self, directory: Path, size: int, capacity: int) -> None:
        self.store = SlotStore(directory, size, capacity)
        self.slots: dict[bytes, int] = {}
        self.free = list(range(capacity))

    def put(self, key: bytes, value: Block) -> None:
        if not self.free:
            self.free.append(self.slots.pop(next(iter(self.slots))))
        slot = self.slots[key] = self.free.pop(0)
        self.store.write(StoredBlock(BlockHash(key), slot, 0, 1), value)

    def get(self, key: bytes, target: Block) -> None:
        self.store.read(self.slots[key], target)  # compares nothing, but pays for the checksum


class Segments:
    """Append-only files; the oldest is deleted whole."""

    BYTES = 64 << 20

    def __init__(self, directory: Path, size: int, capacity: int) -> None:
        self.directory, self.size, self.most = directory, size, capacity * size
        self.places: dict[bytes, tuple[int, int]] = {}
        self.files: dict[int, int] = {}
        self._start(0)

    def _start(self, number: int) -> None:
        self.number, self.offset = number, 0
        self.files[number] = os.open(self.directory / str(number), os.O_RDWR | os.O_CREAT)
        while len(self.files) * self.BYTES > self.most + self.BYTES:
            oldest = min(self.files)
            os.close(self.files.pop(oldest))
            (self.directory / str(oldest)).unlink()
            self.places = {key: place for key, place in self.places.items() if place[0] != oldest}

    def put(self, key: bytes, value: Block) -> None:
        if self.offset + self.size > self.BYTES:
            self._start(self.number + 1)
        os.pwrite(self.files[self.number], value.data, self.offset)
        self.places[key] = (self.number, self.offset)
        self.offset += self.size

    def get(self, key: bytes, target: Block) -> None:
        number, offset = self.places[key]
        os.preadv(self.files[number], [target.data], offset)
        block_checksum(target)


class Lmdb:
    """One write transaction per block, no sync."""

    def __init__(self, directory: Path, size: int, capacity: int) -> None:
        import lmdb

        map_size = int(capacity * (size + 4096) * 1.5) + (64 << 20)
        self.environment = lmdb.open(str(directory), map_size=map_size, sync=False)
        self.keys: dict[bytes, None] = {}
        self.capacity = capacity

    def put(self, key: bytes, value: Block) -> None:
        with self.environment.begin(write=True) as transaction:
            if len(self.keys) >= self.capacity:
                oldest = next(iter(self.keys))
                del self.keys[oldest]
                transaction.delete(oldest)
            transaction.put(key, value.data)
        self.keys[key] = None

    def get(self, key: bytes, target: Block) -> None:
        with self.environment.begin(buffers=True) as transaction:
            np.copyto(target, np.frombuffer(transaction.get(key), np.uint8))
        block_checksum(target)


class Rocks:
    """Values in blob files, collected by its own threads."""

    def __init__(self, directory: Path, size: int, capacity: int) -> None:
        import rocksdict

        options = rocksdict.Options(raw_mode=True)
        options.set_compression_type(rocksdict.DBCompressionType.none())
        options.set_enable_blob_files(True)
        options.set_min_blob_size(1024)
        options.set_enable_blob_gc(True)
        self.database = rocksdict.Rdict(str(directory), options)
        self.keys: dict[bytes, None] = {}
        self.capacity = capacity

    def put(self, key: bytes, value: Block) -> None:
        if len(self.keys) >= self.capacity:
            oldest = next(iter(self.keys))
            del self.keys[oldest]
            self.database.delete(oldest)
        self.database[key] = value.tobytes()
        self.keys[key] = None

    def get(self, key: bytes, target: Block) -> None:
        np.copyto(target, np.frombuffer(self.database[key], np.uint8))
        block_checksum(target)


STORES: dict[str, tuple[str, Callable[[Path, int, int], Store]]] = {
    "slots": ("", Slots),
    "segments": ("", Segments),
    "lmdb": ("lmdb", Lmdb),
    "rocksdict": ("rocksdict", Rocks),
}


def _measure(make: Callable[[Path, int, int], Store], directory: Path, size: int, total: int) -> str:
    capacity = total // size
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (8, size), dtype=np.uint8)
    keys = [number.to_bytes(16, "little") for number in range(capacity * 5 // 2)]
    store = make(directory, size, capacity)

    def write(chosen: list[bytes]) -> float:
        started_s = time.perf_counter()
        for key in chosen:
            store.put(key, values[key[0] % 8])
        return len(chosen) * size / (time.perf_counter() - started_s) / 1e9

    first, again = write(keys[:capacity]), write(keys[capacity:])
    target = np.empty(size, np.uint8)
    wanted = [keys[len(keys) - 1 - i] for i in rng.permutation(capacity // 2)]
    started_s = time.perf_counter()
    for key in wanted:
        store.get(key, target)
    read = len(wanted) * size / (time.perf_counter() - started_s) / 1e9
    used = sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())
    return f"write {first:6.2f}  overwrite {again:6.2f}  read and check {read:6.2f} GB/s  space x{used / total:.2f}"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=None, help="on the disk to measure")
    parser.add_argument("--mib", type=int, default=512, help="of each store")
    arguments = parser.parse_args()
    for size in (32 << 10, 256 << 10, 2 << 20):
        for name, (package, make) in STORES.items():
            if package and importlib.util.find_spec(package) is None:
                print(f"{size >> 10:5d} KiB  {name:10s} not installed")
                continue
            directory = Path(tempfile.mkdtemp(dir=arguments.directory, prefix="tandem-store-"))
            try:
                figures = _measure(make, directory, size, arguments.mib << 20)
                print(f"{size >> 10:5d} KiB  {name:10s} {figures}", flush=True)
            finally:
                shutil.rmtree(directory)


if __name__ == "__main__":
    main()
