"""At start-up: the arena of the life before, or a new one; never one that somebody may still write."""

from pathlib import Path

import pytest

from protos import kv_transfer_pb2 as pb
from shared.kv_arena import SharedArena
from shared.seal_table import SealTable
from shared.worker.arena_adoption import ask_kv_transfer, open_worker_arena

NAMES = [bytes([i]) * 16 for i in range(1, 9)]


class Sidecar:
    """Answers with the sealed slots that it finds, without those it is told to leave out."""

    def __init__(self, answer=None, without=()):
        self.answer, self.without, self.asked = answer, without, []

    def __call__(self, request):
        self.asked.append(request)
        if self.answer is not None:
            return self.answer
        table = SealTable.open(table_path_of(request), request.num_blocks, request.block_bytes, request.fingerprint)
        slots = [slot for slot in table.sealed() if slot.block_id not in self.without]
        return pb.AdoptReply(
            block_ids=[slot.block_id for slot in slots], block_hashes=b"".join(slot.name for slot in slots)
        )


def table_path_of(request):
    return Path(request.seal_table)


@pytest.fixture
def start(tmp_path):
    def start(ask, num_blocks=8, block_bytes=4096, fingerprint="fp"):
        return open_worker_arena(tmp_path / "w.kv", num_blocks, block_bytes, fingerprint, "w", ask)

    return start


@pytest.fixture
def left(start):
    """A life that sealed three blocks and was killed."""
    memory = start(Sidecar())
    for slot in (6, 0, 3):
        memory.arena.blocks[slot] = slot + 1
        memory.table.record(slot, NAMES[slot])
    return memory


def is_new(memory):
    return memory.adopted == [] and not memory.arena.blocks.any() and memory.table.sealed() == []


def test_the_first_start_makes_an_arena_and_asks_nobody(start):
    sidecar = Sidecar()
    assert is_new(start(sidecar))
    assert sidecar.asked == []


def test_a_killed_workers_blocks_are_adopted_with_their_bytes(left, start):
    memory = start(Sidecar())
    assert memory.adopted == [(6, NAMES[6]), (0, NAMES[0]), (3, NAMES[3])]
    assert all((memory.arena.blocks[slot] == slot + 1).all() for slot in (6, 0, 3))


def test_blocks_that_do_not_match_are_cleared_from_the_table(left, start):
    memory = start(Sidecar(without=(0,)))
    assert [block_id for block_id, _ in memory.adopted] == [6, 3]
    assert [slot.block_id for slot in memory.table.sealed()] == [6, 3]


@pytest.mark.parametrize("change", [{"num_blocks": 9}, {"block_bytes": 8192}, {"fingerprint": "other"}])
def test_an_arena_of_another_kind_is_replaced_without_asking(left, start, change):
    sidecar = Sidecar()
    assert is_new(start(sidecar, **change))
    assert sidecar.asked == []


@pytest.mark.parametrize("answer", [pb.AdoptReply(refused="still attached"), "none"])
def test_without_kv_transfers_word_the_arena_is_a_new_file(left, start, answer):
    memory = start((lambda request: None) if answer == "none" else Sidecar(answer))
    assert is_new(memory)
    left.arena.blocks[1] = 9  # whoever still writes the old one harms nobody
    assert not memory.arena.blocks.any()


def test_an_arena_without_a_table_is_replaced(left, start):
    left.table.unlink()
    assert is_new(start(Sidecar()))


def test_half_made_files_of_a_start_that_was_killed_are_replaced(left, start):
    left.table.path.write_bytes(bytes(left.table.path.stat().st_size))
    assert is_new(start(Sidecar()))


def test_a_leftover_of_a_dead_life_never_hinders_a_start(left, start, tmp_path):
    """With room for one arena only: the old one goes first."""
    path = left.arena.path
    path.write_bytes(b"x")
    assert is_new(start(Sidecar()))
    assert SharedArena.open(path, 8, 4096).num_blocks == 8


async def test_a_start_without_a_kv_transfer_does_not_wait_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr("shared.worker.arena_adoption.CONNECT_S", 0.2)
    assert await ask_kv_transfer(tmp_path / "nobody.sock", pb.AdoptRequest()) is None
