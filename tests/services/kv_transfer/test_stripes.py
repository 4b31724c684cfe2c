"""A large pull over a transport of several lanes is fetched in as many stripes, at the same time."""

import asyncio

import pytest

from services.kv_transfer.pull import STRIPED_BYTES, _stripes
from shared.settle import all_or_none

BIG, NUM_BIG = 3 << 20, 15


@pytest.mark.parametrize(
    ("num_blocks", "block_bytes", "lanes", "expected"),
    [
        (4, STRIPED_BYTES // 4, 2, [range(2), range(2, 4)]),
        (5, STRIPED_BYTES // 4, 2, [range(2), range(2, 5)]),
        (3, STRIPED_BYTES // 4, 2, [range(3)]),
        (4, STRIPED_BYTES, 1, [range(4)]),
        (1, STRIPED_BYTES, 2, [range(1)]),
    ],
)
def test_stripes_cover_every_block_once(num_blocks, block_bytes, lanes, expected):
    assert _stripes(num_blocks, block_bytes, lanes) == expected


async def stay(story):
    try:
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(0.05)
        story.append("quiet")


async def test_the_failure_of_one_is_raised_when_the_others_have_ended():
    story = []

    async def fail():
        await asyncio.sleep(0.01)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await all_or_none([stay(story), fail(), stay(story)])
    assert story == ["quiet", "quiet"]


async def test_all_end_with_the_one_who_waits_for_them():
    story = []
    waiting = asyncio.create_task(all_or_none([stay(story), stay(story)]))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert story == ["quiet", "quiet"]


@pytest.mark.e2e
async def test_blocks_of_both_stripes_arrive_and_one_that_is_not_there_is_missing_alone(cluster, make_hashes):
    holder, puller = await cluster.pair(num_blocks=NUM_BIG, block_bytes=BIG, ucx_tls="shm", seal_table=True)
    hashes = make_hashes(NUM_BIG)
    for i, block_hash in enumerate(hashes):
        holder.blocks[i] = i + 1
        if i != NUM_BIG - 2:
            holder.table.record(i, block_hash)
    order = list(reversed(range(NUM_BIG)))
    for _ in range(3):
        puller.blocks[:] = 0
        reply = await puller.pull(holder, hashes, order)
        assert (reply.error, reply.missing, reply.mismatched) == ("", 1, 0)
        assert [i for i, is_verified in enumerate(reply.verified) if not is_verified] == [NUM_BIG - 2]
        assert reply.bytes == (NUM_BIG - 1) * BIG
        expected = [0 if i == NUM_BIG - 2 else i + 1 for i in order]
        assert [set(block[:: 1 << 20]) for block in puller.blocks] == [{value} for value in expected]
