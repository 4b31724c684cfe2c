"""Touches an arena's pages before transfers do: the first touch of a page costs more than copying it."""

from __future__ import annotations

import mmap
import time

import structlog

from shared.kv_arena import SharedArena

log = structlog.get_logger(__name__)

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14; changes no byte
_STEP_BYTES = 2 << 20  # the GIL is held meanwhile


def prefault(arena: SharedArena) -> None:
    """Maps every page of the arena into this process. Blocks; for a thread. Does nothing on a kernel that cannot."""
    started_s = time.monotonic()
    size = arena.num_blocks * arena.block_bytes
    step = max(_STEP_BYTES, mmap.PAGESIZE)
    for start in range(0, size, step):
        try:
            arena.buffer.madvise(_POPULATE_WRITE, start, min(step, size - start))
        except (OSError, ValueError) as exc:  # an old kernel, or the arena was closed
            log.info("prefault_ended", reason=str(exc))
            return
        time.sleep(0)
    log.info("arena_prefaulted", mib=size >> 20, seconds=round(time.monotonic() - started_s, 3))
