"""Copies blocks to the host tier before they are evicted, so that eviction never waits for a copy.

The pool hands out its least recently used, not yet saved blocks, pinned; kv_transfer copies them; they are unpinned.
When pressure outruns the copies, a block is simply lost: that costs time later, never correctness.

Device memory goes with its worker. There everything that is sealed is copied as soon as nothing else is to be done, so
that a killed worker loses what it sealed since it was last idle, and its host tier serves the rest on.
"""

from __future__ import annotations

import asyncio

from shared.engine.engine import Engine
from shared.identity import BlockHash, BlockId
from shared.worker.sidecar_link import SidecarLink

BLOCKS_PER_SAVE = 32
IDLE_S = 0.05


async def save_ahead(engine: Engine, link: SidecarLink, *, memory_outlives_worker: bool) -> None:
    """Runs until cancelled; one Save at a time."""
    full_since_step = -1  # the tier took nothing of what an idle worker offered: asked again once there is more
    while True:
        stats = engine.stats()
        is_idle = not (stats.running or stats.waiting or stats.waiting_for_kv)
        everything = is_idle and not memory_outlives_worker and stats.steps != full_since_step
        unsaved = engine.take_unsaved(BLOCKS_PER_SAVE, everything=everything) if link.is_attached else []
        if not unsaved:
            await asyncio.sleep(IDLE_S)
            continue
        # Shielded: the blocks stay pinned until the copy is known to be over, also when this task is cancelled.
        flags = await asyncio.shield(asyncio.ensure_future(_save(engine, link, unsaved)))
        if everything and not any(flags):
            full_since_step = stats.steps


async def save_all(engine: Engine, link: SidecarLink) -> int:
    """Copies everything that is cached and not saved yet; returns how many blocks were taken."""
    num_saved = 0
    while link.is_attached and (unsaved := engine.take_unsaved(BLOCKS_PER_SAVE, everything=True)):
        flags = await asyncio.shield(asyncio.ensure_future(_save(engine, link, unsaved)))
        num_saved += sum(flags)
        if not any(flags):
            break  # the tier is full of better ones, or off
    return num_saved


async def _save(engine: Engine, link: SidecarLink, unsaved: list[tuple[BlockHash, BlockId]]) -> list[bool]:
    flags = [False] * len(unsaved)
    try:
        flags = await link.save([block_hash for block_hash, _ in unsaved], [block_id for _, block_id in unsaved])
    finally:
        engine.saved(unsaved, flags)
    return flags
