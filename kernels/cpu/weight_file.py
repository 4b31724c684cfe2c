"""Packed weights in shared memory: the first process of a machine packs, the others map what it packed.

A file `tandem-weights-<uid>-<key>.weights` appears under its name only when it is complete, so a crash leaves at most a
temporary file, which the next start removes. Everything that opens, packs or removes holds the directory's lock;
whoever maps a file holds a shared lock on it for life, and a file that nobody holds is removed by the next start or by
its last user.

Only on huge pages: on 4 KiB pages a core reads little more than half as fast (15 to 19 GB/s against 29, AMD EPYC),
which costs more than a second copy. A kernel before 6.1 cannot make them for a file: then, or when the memory is not to
be had, `weight_file` raises and the caller keeps weights of its own.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import structlog

from kernels.cpu.weight_memory import ALIGNMENT, HUGE_PAGE_BYTES, Bytes

log = structlog.get_logger(__name__)

_PREFIX = f"tandem-weights-{os.geteuid()}-"
_SUFFIX = ".weights"
_PACKING = ".packing"
_PROT_READ, _PROT_WRITE, _MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED = 1, 2, 0x1, 0x2, 0x10
_MAP_ANONYMOUS, _MAP_NORESERVE = 0x20, 0x4000
_MADV_COLLAPSE = 25


class WeightFile:
    """A file of packed weights, handed out piece by piece in the order in which they were packed.

    Attributes:
        complete: Pieces already hold packed weights; else whoever allocates them fills them.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        """Opens or creates; `weight_file` does, holding the lock."""
        self._path = path
        self._used = 0
        self._size = -(-nbytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        self.complete = path.exists()
        self._temporary = path.with_suffix(_PACKING)
        flags = os.O_RDONLY if self.complete else os.O_RDWR | os.O_CREAT | os.O_TRUNC
        name = path if self.complete else self._temporary
        self._file = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        # Of its own: a mapping keeps the file behind its descriptor open, and with it that one's lock.
        self._lock = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._address = 0
        try:
            self._claim()
        except OSError:
            self.abandon()
            raise
        whole = (ctypes.c_uint8 * self._size).from_address(self._address)
        self._bytes: Bytes = np.ctypeslib.as_array(whole)

    def _claim(self) -> None:
        stat = os.fstat(self._file)
        if stat.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, f"{self._path} belongs to another user")
        if not self.complete:
            os.posix_fallocate(self._file, 0, self._size)  # what is not there must fail here, not as a signal later
        elif stat.st_size != self._size:
            raise OSError(errno.EINVAL, f"{self._path} has {stat.st_size} bytes, expected {self._size}")
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        self._address = _map_aligned(self._file, self._size, writable=not self.complete)
        if not self.complete and _collapse(self._address, HUGE_PAGE_BYTES):
            raise OSError(ctypes.get_errno(), "this kernel makes no huge pages for shared memory")

    def allocate(self, nbytes: int) -> Bytes:
        """The next piece, aligned to 64; valid until the process ends."""
        piece = self._bytes[self._used : self._used + nbytes]
        assert piece.nbytes == nbytes, "more pieces than the file was made for"
        self._used += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return piece

    def finish(self) -> None:
        """After the last piece is filled: moves the file to huge pages and gives it its name."""
        if self.complete:
            return
        if _collapse(self._address, self._size):
            log.warning("weights_partly_on_small_pages", costs="decode steps may take up to half as long again")
        os.fchmod(self._lock, 0o400)
        self._temporary.rename(self._path)
        self.complete = True

    def abandon(self) -> None:
        """Undoes everything; pieces are invalid afterwards."""
        if self._address:
            _libc.munmap(self._address, self._size)
        if not self.complete:
            self._temporary.unlink(missing_ok=True)
        os.close(self._file)
        os.close(self._lock)

    def release(self) -> None:
        """Removes the file unless another process uses it; pieces stay valid."""
        with suppress(OSError), _directory_lock(self._path.parent):
            os.close(self._lock)
            _remove_if_unused(self._path)


@contextmanager
def weight_file(directory: Path, key: str, nbytes: int) -> Iterator[WeightFile]:
    """Opens the file of a key, or creates it: then the block fills it while others that want it wait.

    Leaving the block finishes the file; an exception inside leaves none. Files of `directory` that no process uses any
    more are removed. At exit the process removes this one unless another still uses it.

    Args:
        directory: In shared memory (tmpfs), as `/dev/shm`.
        key: Names checkpoint, format and layout; equal keys mean equal bytes.
        nbytes: Of all pieces together, with their alignment.

    Raises:
        OSError: Too little shared memory, or no huge pages in it.
    """
    with _directory_lock(directory):
        path = directory / f"{_PREFIX}{key}{_SUFFIX}"
        for stale in directory.glob(f"{_PREFIX}*"):
            if stale != path and stale.suffix in (_SUFFIX, _PACKING):
                _remove_if_unused(stale)
        file = WeightFile(path, nbytes)
        try:
            yield file
            file.finish()
        except BaseException:
            file.abandon()
            raise
    atexit.register(file.release)


@contextmanager
def _directory_lock(directory: Path) -> Iterator[None]:
    path = directory / f"{_PREFIX}lock"
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting_for_another_worker_to_pack_weights")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_if_unused(path: Path) -> None:
    with suppress(OSError):
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(file)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def _map_aligned(file: int, nbytes: int, *, writable: bool) -> int:
    """Maps a file where huge pages fit, for the rest of the process's life."""
    flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE
    reserved = _libc.mmap(None, nbytes + HUGE_PAGE_BYTES, 0, flags, -1, 0)
    if reserved is None or reserved == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "cannot reserve address space for weights")
    address = -(-reserved // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    protection = _PROT_READ | (_PROT_WRITE if writable else 0)
    mapped = _libc.mmap(address, nbytes, protection, _MAP_SHARED | _MAP_FIXED, file, 0)
    if mapped != address:
        raise OSError(ctypes.get_errno(), "cannot map the weights' file")
    return int(address)


def _collapse(address: int, nbytes: int) -> bool:
    """Whether moving a range to huge pages failed."""
    return bool(_libc.madvise(address, nbytes, _MADV_COLLAPSE) != 0)
