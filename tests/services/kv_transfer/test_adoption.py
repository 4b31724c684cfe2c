"""A worker that died: its kv_transfer serves on, and hands the arena to the next life, whole blocks only."""

import asyncio

import numpy as np
import pytest

from protos import kv_transfer_pb2 as pb
from shared.identity import split_hashes
from shared.seal_table import table_path

pytestmark = [pytest.mark.timeout(120), pytest.mark.e2e]

NUM = 16


def seal(node, hashes, first_block=0, seed=0):
    """As a worker does: bytes, then the table, then the news."""
    expected = node.seal(hashes, first_block, seed)
    for block_id, block_hash in enumerate(hashes, first_block):
        node.table.record(block_id, block_hash)
    return expected


async def publish(node, hashes):
    call = node.stub.Publish()
    await call.write(pb.BlockEvents(reset=True, sealed=b"".join(hashes)))
    return call


async def until_checked(node):
    async with asyncio.timeout(30):
        while node.table.unchecked():
            await asyncio.sleep(0.01)


async def die(node):
    """The connection breaks, and nobody answers pins any more."""
    node.call.cancel()
    await node.host_server.stop(0)
    async with asyncio.timeout(30):
        while (await node.transfer_status()).attached:
            await asyncio.sleep(0.01)


def adopt_request(node, **changes):
    fields = {
        "worker_id": node.worker_id,
        "fingerprint": node.fingerprint,
        "arena_path": str(node.arena.path),
        "seal_table": str(node.table.path),
        "num_blocks": node.num_blocks,
        "block_bytes": node.block_bytes,
    }
    return pb.AdoptRequest(**{**fields, **changes})


async def adopt(node, **changes):
    reply = await node.stub.Adopt(adopt_request(node, **changes))
    return reply.refused, dict(zip(reply.block_ids, split_hashes(reply.block_hashes), strict=True))


@pytest.fixture
async def pair(cluster):
    holder, puller = await cluster.pair(seal_table=True)
    return holder, puller


async def test_a_dead_workers_sealed_blocks_are_served_on(pair, make_hashes):
    holder, puller = pair
    hashes = make_hashes(NUM)
    expected = seal(holder, hashes)
    await publish(holder, hashes)
    await die(holder)
    reply = await puller.pull(holder, hashes, list(range(NUM)))
    assert (reply.error, list(reply.verified)) == ("", [True] * NUM)
    assert all((puller.blocks[i] == expected[h]).all() for i, h in enumerate(hashes))


async def test_a_slot_that_was_being_written_at_death_is_neither_served_nor_adopted(pair, make_hashes):
    holder, puller = pair
    hashes = make_hashes(NUM)
    seal(holder, hashes)
    await publish(holder, hashes)
    holder.table.record(3, None)  # given away
    holder.blocks[3, :100] = 0
    await die(holder)
    reply = await puller.pull(holder, hashes, list(range(NUM)))
    assert [i for i, ok in enumerate(reply.verified) if not ok] == [3]
    assert reply.missing == 1
    refused, adopted = await adopt(holder)
    assert (refused, 3 in adopted, len(adopted)) == ("", False, NUM - 1)


async def test_the_next_life_gets_every_whole_block_in_the_order_of_sealing(pair, make_hashes):
    holder, puller = pair
    hashes = make_hashes(NUM)
    seal(holder, list(reversed(hashes)))
    await publish(holder, hashes)
    await die(holder)
    refused, adopted = await adopt(holder)
    assert refused == ""
    assert list(adopted.values()) == list(reversed(hashes))
    assert (await puller.pull(holder, hashes, list(range(NUM)))).missing == NUM  # not served while it changes hands


async def test_bytes_that_changed_after_they_were_checked_are_not_handed_over(pair, make_hashes):
    holder, _ = pair
    hashes = make_hashes(NUM)
    seal(holder, hashes)
    await publish(holder, hashes)
    await until_checked(holder)
    holder.blocks[5, 1000] ^= 1
    await die(holder)
    _, adopted = await adopt(holder)
    assert set(adopted) == set(range(NUM)) - {5}


async def test_when_both_died_only_what_had_a_checksum_is_adopted(pair, make_hashes):
    holder, _ = pair
    hashes = make_hashes(NUM)
    seal(holder, hashes[:10])
    await publish(holder, hashes[:10])
    await until_checked(holder)
    holder.process.kill()
    await asyncio.to_thread(holder.process.wait)
    seal(holder, hashes[10:], first_block=10)
    holder.start_process()
    reply = await holder.stub.Adopt(adopt_request(holder), wait_for_ready=True)
    assert list(reply.block_ids) == list(range(10))


async def test_an_arena_whose_worker_is_still_attached_is_refused(pair):
    holder, _ = pair
    refused, _ = await adopt(holder)
    assert "still attached" in refused


async def test_another_size_or_fingerprint_is_refused(pair):
    holder, _ = pair
    await die(holder)
    assert (await adopt(holder, num_blocks=5))[0]
    assert (await adopt(holder, fingerprint="model-z"))[0]
    assert (await adopt(holder))[0] == ""


async def test_a_transfer_out_of_the_dead_workers_arena_ends_before_it_is_handed_over(cluster, make_hashes):
    block_bytes = 3 << 20
    holder, puller = await cluster.pair(num_blocks=NUM, block_bytes=block_bytes, seal_table=True)
    hashes = make_hashes(NUM)
    holder.blocks[:] = np.arange(1, NUM + 1, dtype=np.uint8)[:, None]
    for i, block_hash in enumerate(hashes):
        holder.table.record(i, block_hash)
    await publish(holder, hashes)
    await die(holder)
    pulling = asyncio.ensure_future(puller.pull(holder, hashes, list(range(NUM))))
    await asyncio.sleep(0.02)
    refused, adopted = await adopt(holder)
    holder.blocks[:] = 0  # the next life writes
    assert (refused, len(adopted)) == ("", NUM)
    reply = await pulling
    assert all((puller.blocks[i] == i + 1).all() for i, ok in enumerate(reply.verified) if ok)


async def test_a_copy_to_the_tier_of_a_block_that_was_given_away_meanwhile_does_not_count(pair, make_hashes):
    holder, _ = pair
    hashes = make_hashes(4)
    seal(holder, hashes)
    holder.table.record(2, None)
    assert await holder.save(hashes) == [True, True, False, True]


async def test_sigterm_after_the_workers_death_leaves_nothing_in_shared_memory(pair, make_hashes):
    holder, _ = pair
    seal(holder, make_hashes(4))
    await die(holder)
    holder.process.terminate()
    assert await asyncio.to_thread(holder.process.wait, 20) == 0
    assert not holder.arena.path.exists()
    assert not table_path(holder.arena.path).exists()


async def test_sigterm_of_kv_transfer_alone_leaves_its_workers_arena(pair):
    holder, _ = pair
    holder.process.terminate()
    assert await asyncio.to_thread(holder.process.wait, 20) == 0
    assert holder.arena.path.exists()
    holder.start_process()
    await holder.attach()


async def test_few_blocks_are_sent_without_a_call_to_the_worker_and_many_are_pinned(cluster, make_hashes):
    holder, puller = await cluster.pair(num_blocks=24, block_bytes=1 << 20, seal_table=True)
    hashes = make_hashes(24)
    expected = seal(holder, hashes)
    calls = []
    holder.host.on_pin = calls.append
    for count in (1, 8, 24):
        reply = await puller.pull(holder, hashes[:count], list(range(count)))
        assert (reply.error, list(reply.verified)) == ("", [True] * count)
    assert calls == [24]
    assert all((puller.blocks[i] == expected[h]).all() for i, h in enumerate(hashes))


async def test_a_worker_that_cannot_pin_does_not_hold_up_what_its_table_names(cluster, make_hashes):
    holder, puller = await cluster.pair(num_blocks=24, block_bytes=1 << 20, seal_table=True)
    hashes = make_hashes(24)
    expected = seal(holder, hashes)

    def refuse(count):
        raise ZeroDivisionError

    holder.host.on_pin = refuse
    reply = await puller.pull(holder, hashes, list(range(24)))
    assert (reply.error, list(reply.verified)) == ("", [True] * 24)
    assert all((puller.blocks[i] == expected[h]).all() for i, h in enumerate(hashes))


async def test_blocks_given_away_while_they_are_sent_are_missing_and_never_wrong(cluster, make_hashes):
    """An engine that seals, evicts and overwrites as fast as it can beside pulls of its blocks."""
    holder, puller = await cluster.pair(num_blocks=8, block_bytes=1 << 20, seal_table=True)
    names = iter(make_hashes(4000))
    held = {}

    def overwrite(block_id, number):
        holder.table.record(block_id, None)
        holder.blocks[block_id] = number % 251
        name = next(names)
        holder.table.record(block_id, name)
        held[name] = number % 251

    async def engine():
        for number in range(8, 4000):
            overwrite(number % 8, number)
            await asyncio.sleep(0.0005)

    for number in range(8):
        overwrite(number, number)
    running = asyncio.create_task(engine())
    verified = missing = 0
    for _ in range(40):
        wanted = list(held)[-6:]
        reply = await puller.pull(holder, wanted, list(range(6)))
        assert (reply.error, reply.mismatched) == ("", 0)
        for i, (name, ok) in enumerate(zip(wanted, reply.verified, strict=True)):
            assert not ok or (puller.blocks[i] == held[name]).all()
        verified, missing = verified + sum(reply.verified), missing + reply.missing
    running.cancel()
    assert missing
    assert verified + missing == 240
