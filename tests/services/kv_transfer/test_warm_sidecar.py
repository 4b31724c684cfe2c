"""A kv_transfer that was killed finds its disk again, and serves from it what nobody else has any more."""

import asyncio

import pytest

pytestmark = [pytest.mark.timeout(120), pytest.mark.e2e]

NUM = 24


async def on_disk(node, count):
    async with asyncio.timeout(30):
        while (await node.transfer_status()).disk_blocks < count:
            await asyncio.sleep(0.02)


async def restarted(node):
    node.process.kill()
    await asyncio.to_thread(node.process.wait)
    node.call.cancel()
    node.start_process()
    await node.attach()


@pytest.fixture
async def disk_pair(cluster, tmp_path):
    return await cluster.pair(disk_path=tmp_path, disk_bytes=64 << 20)


async def test_a_killed_kv_transfer_serves_from_its_disk_afterwards(disk_pair, make_hashes):
    holder, puller = disk_pair
    hashes = make_hashes(NUM)
    expected = holder.seal(hashes)
    assert all(await holder.save(hashes))
    await on_disk(holder, NUM)
    holder.host.sealed.clear()  # the arena has them no more
    await restarted(holder)
    assert holder.attached.disk_blocks == NUM
    await puller.wait_until_known(holder)
    reply = await puller.pull(holder, hashes, list(range(NUM)))
    assert (reply.error, list(reply.verified)) == ("", [True] * NUM)
    own = await holder.pull(None, hashes, list(range(30, 30 + NUM)))
    assert all(own.verified)
    for i, block_hash in enumerate(hashes):
        assert (puller.blocks[i] == expected[block_hash]).all()
        assert (holder.blocks[30 + i] == expected[block_hash]).all()


async def test_a_kv_transfer_killed_while_it_writes_serves_whole_blocks_or_none(disk_pair, make_hashes):
    holder, _ = disk_pair
    hashes = make_hashes(60)
    expected = holder.seal(hashes)
    assert all(await holder.save(hashes))
    await on_disk(holder, 1)
    await restarted(holder)
    reply = await holder.pull(None, hashes, list(range(60)))
    assert any(reply.verified)
    assert reply.mismatched == 0
    for i, (block_hash, ok) in enumerate(zip(hashes, reply.verified, strict=True)):
        assert not ok or (holder.blocks[i] == expected[block_hash]).all()


async def test_sigterm_leaves_everything_on_disk(disk_pair, make_hashes):
    holder, _ = disk_pair
    hashes = make_hashes(60)
    holder.seal(hashes)
    assert all(await holder.save(hashes))
    holder.call.cancel()
    holder.process.terminate()
    assert await asyncio.to_thread(holder.process.wait, 20) == 0
    holder.start_process()
    await holder.attach()
    assert holder.attached.disk_blocks == 60
