"""Readies an arena's pages before transfers use them.

The first touch of a page costs more than copying it, and blocks on huge pages are copied in two thirds of the time.
"""

from __future__ import annotations

import os
import threading
import time

import structlog

from kernels.huge_pages import HUGE_PAGE_BYTES, collapse, populate
from shared.kv_arena import SharedArena

log = structlog.get_logger(__name__)

_NICE = 10  # there is a worker starting on the same cores
_MAX_REFUSALS = 16  # of a kernel that cannot, or has no more; each may have cost it a search


def prefault(arena: SharedArena) -> None:
    """Gives every page of the arena its place, on huge pages where the kernel has some. Blocks; for a thread."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
    started_s = time.monotonic()
    memory, num_huge = arena.blocks.reshape(-1), 0
    refusals: list[str] = []
    for start in range(0, memory.nbytes, HUGE_PAGE_BYTES):
        piece = memory[start : start + HUGE_PAGE_BYTES]
        try:
            populate(piece)
        except OSError as exc:
            log.info("prefault_ended", reason=str(exc))
            return
        if piece.nbytes < HUGE_PAGE_BYTES or len(refusals) == _MAX_REFUSALS:
            continue
        try:
            collapse(piece)
            num_huge += 1
        except OSError as exc:
            refusals.append(str(exc))
    log.info(
        "arena_prefaulted",
        mib=memory.nbytes >> 20,
        on_huge_pages_mib=num_huge * HUGE_PAGE_BYTES >> 20,
        refused=refusals[-1] if refusals else "",
        seconds=round(time.monotonic() - started_s, 3),
    )
