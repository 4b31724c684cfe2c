"""A worker whose memory goes with it, as a GPU's does: nothing to adopt, and what its host tier has is served on."""

import asyncio

import pytest

from protos import kv_transfer_pb2 as pb
from services.kv_transfer.attachment import Attachment
from shared.kv_arena import SharedArena

pytestmark = [pytest.mark.timeout(120), pytest.mark.e2e]

NUM, SAVED = 12, 5


async def kill_worker(node):
    node.call.cancel()
    await node.host_server.stop(0)
    async with asyncio.timeout(30):
        while (await node.transfer_status()).attached:
            await asyncio.sleep(0.01)
    node.blocks[:] = 0xEE  # whoever reads on reads this


async def test_peers_get_what_the_tier_has_and_learn_that_the_rest_is_gone(pair, make_hashes):
    holder, puller = pair
    hashes = make_hashes(NUM)
    expected = holder.seal(hashes)
    assert await holder.save(hashes[:SAVED]) == [True] * SAVED
    await kill_worker(holder)
    reply = await puller.pull(holder, hashes, list(range(NUM)))
    assert (reply.error, list(reply.verified)) == ("", [True] * SAVED + [False] * (NUM - SAVED))
    assert (reply.missing, reply.mismatched) == (NUM - SAVED, 0)
    assert all((puller.blocks[i] == expected[h]).all() for i, h in enumerate(hashes[:SAVED]))


async def test_its_next_life_starts_empty_and_fetches_from_the_tier(pair, make_hashes):
    node, _ = pair
    hashes = make_hashes(NUM, seed=2)
    expected = node.seal(hashes)
    assert await node.save(hashes[:SAVED]) == [True] * SAVED
    await kill_worker(node)
    node.host.sealed.clear()
    await node.start_worker()
    await node.attach()
    assert node.attached.tier_blocks >= SAVED
    reply = await node.pull(None, hashes, list(range(NUM)))
    assert list(reply.verified) == [True] * SAVED + [False] * (NUM - SAVED)
    assert all((node.blocks[i] == expected[h]).all() for i, h in enumerate(hashes[:SAVED]))


async def test_what_was_copied_while_the_worker_ended_does_not_count(tmp_path, make_hashes):
    arena = SharedArena.create(tmp_path / "arena", 4, 4096)
    attachment = Attachment(
        pb.AttachRequest(
            worker_id="w", incarnation="1", fingerprint="f", arena_path=str(arena.path), num_blocks=4,
            block_bytes=4096, host_socket=str(tmp_path / "host.sock"), role="decode",
        )
    )  # fmt: skip
    (name,) = make_hashes(1)
    is_unchanged = attachment.watch([name], [0])
    assert is_unchanged(name)
    await attachment.close()
    assert not is_unchanged(name)
