"""An arena is readied for transfers: its pages are in place, on huge ones where there are some; no byte changes."""

import re
import uuid
from pathlib import Path

import numpy as np
import pytest

from kernels.huge_pages import HUGE_PAGE_BYTES, collapse, populate
from services.kv_transfer.prefault import prefault
from shared.kv_arena import SharedArena

BLOCK_BYTES = 5 << 18  # neither a divisor nor a multiple of a huge page
NUM_BLOCKS = 13


@pytest.fixture
def arenas():
    """The worker's mapping of an arena, and the sidecar's."""
    path = Path(f"/dev/shm/tandem-test-{uuid.uuid4().hex}")
    worker = SharedArena.create(path, NUM_BLOCKS, BLOCK_BYTES)
    yield worker, SharedArena.open(path, NUM_BLOCKS, BLOCK_BYTES)
    worker.unlink()


def on_huge_pages(arena):
    """Bytes of the mapping that are on huge pages, as the kernel says."""
    start = arena.blocks.ctypes.data
    smaps = Path("/proc/self/smaps").read_text()
    mapping = smaps[re.search(rf"^0*{start:x}-", smaps, re.MULTILINE).start() :]
    return int(re.search(r"ShmemPmdMapped:\s+(\d+) kB", mapping)[1]) << 10


def test_no_byte_changes_in_either_mapping(arenas):
    worker, sidecar = arenas
    for block_id in range(0, NUM_BLOCKS, 3):
        worker.blocks[block_id] = np.random.default_rng(block_id).integers(0, 256, BLOCK_BYTES, dtype=np.uint8)
    before = worker.blocks.copy()
    prefault(sidecar)
    assert (worker.blocks == before).all()
    assert (sidecar.blocks == before).all()
    worker.blocks[1] = 7
    sidecar.blocks[2] = 9
    assert (sidecar.blocks[1] == 7).all()
    assert (worker.blocks[2] == 9).all()


def test_whole_huge_pages_are_used_by_worker_and_sidecar(arenas):
    worker, sidecar = arenas
    memory = sidecar.blocks.reshape(-1)[:HUGE_PAGE_BYTES]
    populate(memory)
    try:
        collapse(memory)
    except OSError as exc:
        pytest.skip(f"no huge pages for shared memory here: {exc}")
    prefault(sidecar)
    worker.blocks[:] = 1
    expected = NUM_BLOCKS * BLOCK_BYTES // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    assert [on_huge_pages(arena) for arena in arenas] == [expected, expected]


def test_a_mapping_ends_with_its_last_view(arenas):
    path = arenas[0].path
    arena = SharedArena.open(path, NUM_BLOCKS, BLOCK_BYTES)
    block = arena.blocks[3]
    del arena
    block[:] = 5  # still mapped
    assert (arenas[0].blocks[3] == 5).all()
    del block
    assert Path("/proc/self/maps").read_text().count(str(path)) == 2
