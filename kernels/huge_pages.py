"""Files of shared memory on huge pages: with small ones, copying and reading large blocks wait for page tables.

Nobody but the process itself asks for them, and after the fact: what a tmpfs hands out by itself is small pages, on
nearly every machine. A kernel before 6.1 cannot move a file to huge pages.
"""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import numpy.typing as npt

HUGE_PAGE_BYTES = 2 << 20

_PROT_READ, _PROT_WRITE, _MAP_SHARED, _MAP_FIXED = 1, 2, 0x1, 0x10
_MAP_PRIVATE, _MAP_ANONYMOUS, _MAP_NORESERVE = 0x2, 0x20, 0x4000
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14; changes no byte
_COLLAPSE = 25  # MADV_COLLAPSE, Linux 6.1

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


def map_aligned(file: int, nbytes: int, *, writable: bool) -> npt.NDArray[np.uint8]:
    """Maps the first bytes of a file, shared, where huge pages fit.

    Args:
        file: Its descriptor; may be closed afterwards.
        nbytes: At least 1.
        writable: Else a store into the array is a signal.

    Returns:
        uint8 `[nbytes]`; mapped as long as it or a view of it lives.

    Raises:
        OSError: The file cannot be mapped.
    """
    flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE
    reserved = np.frombuffer(mmap.mmap(-1, nbytes + HUGE_PAGE_BYTES, flags=flags), np.uint8)
    start = -reserved.ctypes.data % HUGE_PAGE_BYTES
    mapped = reserved[start : start + nbytes]
    protection = _PROT_READ | (_PROT_WRITE if writable else 0)
    if _libc.mmap(mapped.ctypes.data, nbytes, protection, _MAP_SHARED | _MAP_FIXED, file, 0) != mapped.ctypes.data:
        raise OSError(ctypes.get_errno(), "cannot map the file")
    return mapped


def populate(memory: npt.NDArray[np.uint8]) -> None:
    """Gives every page of writable memory its place, without changing a byte; releases the GIL.

    Raises:
        OSError: A kernel before 5.14, or there is no memory left.
    """
    _advise(memory, _POPULATE_WRITE, "populate")


def collapse(memory: npt.NDArray[np.uint8]) -> None:
    """Moves populated pages to huge ones, as far as whole ones fit, for every process that has them mapped aligned.

    Whoever reads or writes meanwhile is held up for a moment, and sees the same bytes. Releases the GIL.

    Raises:
        OSError: Some stayed small: an old kernel, no huge page to be had, or (EAGAIN) somebody is using them right now.
    """
    _advise(memory, _COLLAPSE, "make huge pages")


def _advise(memory: npt.NDArray[np.uint8], advice: int, what: str) -> None:
    start = memory.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    if _libc.madvise(start, memory.ctypes.data + memory.nbytes - start, advice) != 0:
        raise OSError(ctypes.get_errno(), f"cannot {what}")
