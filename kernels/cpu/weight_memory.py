"""Memory for packed weights on huge pages: a step reads every weight once, and 4 KiB pages cost it a TLB miss each."""

from __future__ import annotations

import mmap

import numpy as np
import numpy.typing as npt

from kernels.huge_pages import HUGE_PAGE_BYTES

Bytes = npt.NDArray[np.uint8]

CHUNK_BYTES = 64 << 20
ALIGNMENT = 64


class WeightMemory:
    """Hands out zeroed pieces of large private mappings; a mapping lives as long as any of its pieces.

    Attributes:
        complete: False: whoever allocates a piece fills it.
    """

    complete = False

    def __init__(self) -> None:
        self._chunk = np.empty(0, np.uint8)
        self._used = 0

    def allocate(self, nbytes: int) -> Bytes:
        """`nbytes` of memory, aligned to 64."""
        if self._used + nbytes > self._chunk.nbytes:
            self._chunk, self._used = _map(max(CHUNK_BYTES, nbytes)), 0
        piece = self._chunk[self._used : self._used + nbytes]
        self._used += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return piece


def _map(nbytes: int) -> Bytes:
    mapping = mmap.mmap(-1, nbytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(mapping, np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE_BYTES
    return whole[start : start + nbytes]
