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
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from kernels.cpu.weight_memory import ALIGNMENT, Bytes
from kernels.huge_pages import HUGE_PAGE_BYTES, collapse, map_aligned

log = structlog.get_logger(__name__)

_PREFIX = f"tandem-weights-{os.geteuid()}-"
_SUFFIX = ".weights"
_PACKING = ".packing"


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
        try:
            self._bytes = self._claim()
        except OSError:
            self.abandon()
            raise

    def _claim(self) -> Bytes:
        stat = os.fstat(self._file)
        if stat.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, f"{self._path} belongs to another user")
        if not self.complete:
            os.posix_fallocate(self._file, 0, self._size)  # what is not there must fail here, not as a signal later
        elif stat.st_size != self._size:
            raise OSError(errno.EINVAL, f"{self._path} has {stat.st_size} bytes, expected {self._size}")
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        mapped = map_aligned(self._file, self._size, writable=not self.complete)
        if not self.complete:
            collapse(mapped[:HUGE_PAGE_BYTES])
        return mapped

    def allocate(self, nbytes: int) -> Bytes:
        """The next piece, aligned to 64; mapped as long as it lives."""
        piece = self._bytes[self._used : self._used + nbytes]
        assert piece.nbytes == nbytes, "more pieces than the file was made for"
        self._used += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return piece

    def finish(self) -> None:
        """After the last piece is filled: moves the file to huge pages and gives it its name."""
        if self.complete:
            return
        try:
            collapse(self._bytes)
        except OSError:
            log.warning("weights_partly_on_small_pages", costs="decode steps may take up to half as long again")
        os.fchmod(self._lock, 0o400)
        self._temporary.rename(self._path)
        self.complete = True

    def abandon(self) -> None:
        """Undoes everything; pieces are of no use afterwards."""
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
