"""Blocks move from one worker's arena into another's, through two real kv_transfer processes and real UCX."""

import asyncio

import pytest
import pytest_asyncio

from protos import kv_transfer_pb2 as pb
from protos import kv_transfer_pb2_grpc as rpc
from shared.errors import FingerprintMismatch, InvalidRequest, StaleIncarnation
from shared.identity import join_hashes
from shared.rpc import open_channel

pytestmark = [pytest.mark.timeout(90), pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(loop_scope="module")
async def pair(lasting_pair):
    """Two nodes with empty arenas."""
    for node in lasting_pair:
        node.host.sealed.clear()
        node.blocks[:] = 0
    return lasting_pair


def outcome(reply):
    return reply.error, list(reply.verified), reply.missing, reply.mismatched


async def settled(node):
    """Waits until no transfer is open and no pin is held."""
    async with asyncio.timeout(30):
        while node.host.num_pins or (await node.transfer_status()).active_transfers:
            await asyncio.sleep(0.01)


async def test_pulled_blocks_equal_the_holders(pair, make_hashes):
    holder, puller = pair
    hashes = make_hashes(20)
    expected = holder.seal(hashes)
    sent_before = (await holder.transfer_status()).sent_bytes
    block_ids = list(range(40, 20, -1))
    reply = await puller.pull(holder, hashes, block_ids)
    assert outcome(reply) == ("", [True] * 20, 0, 0)
    assert reply.bytes == 20 * holder.block_bytes
    assert reply.seconds >= reply.verify_s > 0
    for block_hash, block_id in zip(hashes, block_ids, strict=True):
        assert (puller.blocks[block_id] == expected[block_hash]).all()
    assert not puller.blocks[sorted(set(range(64)) - set(block_ids))].any()
    await settled(holder)
    assert (await holder.transfer_status()).sent_bytes - sent_before == reply.bytes


async def test_blocks_that_the_holder_lacks_are_missing_and_the_rest_arrives(pair, make_hashes):
    holder, puller = pair
    known, unknown = make_hashes(4), make_hashes(3, seed=2)
    expected = holder.seal(known)
    mixed = [unknown[0], known[0], known[1], unknown[1], known[2], unknown[2], known[3]]
    reply = await puller.pull(holder, mixed, list(range(7)))
    assert outcome(reply) == ("", [False, True, True, False, True, False, True], 3, 0)
    for i, block_hash in enumerate(mixed):
        assert (puller.blocks[i] == expected.get(block_hash, 0)).all()
    await settled(holder)
    del holder.host.sealed[known[0]]  # evicted between the hint and the pull
    assert outcome(await puller.pull(holder, known[:2], [10, 11])) == ("", [False, True], 1, 0)
    await settled(holder)


async def test_blocks_that_the_worker_evicted_come_from_the_host_tier(pair, make_hashes):
    holder, puller = pair
    hashes = make_hashes(10, seed=5)
    expected = holder.seal(hashes)
    assert await holder.save(hashes) == [True] * 10
    holder.host.sealed.clear()
    holder.blocks[:] = 0
    reply = await holder.pull(None, hashes, list(range(30, 40)))  # the own worker wants them back
    assert outcome(reply) == ("", [True] * 10, 0, 0)
    assert (await puller.pull(holder, hashes, list(range(10)))).verified == [True] * 10
    for i, block_hash in enumerate(hashes):
        assert (holder.blocks[30 + i] == expected[block_hash]).all()
        assert (puller.blocks[i] == expected[block_hash]).all()
    assert (await holder.transfer_status()).tier_blocks == 10


async def test_many_pulls_at_once_do_not_mix(pair, make_hashes):
    holder, puller = pair
    hashes = make_hashes(64)
    expected = holder.seal(hashes)
    order = [i * 37 % 64 for i in range(64)]
    pulls = [puller.pull(holder, [hashes[i] for i in order[k : k + 2]], order[k : k + 2]) for k in range(0, 64, 2)]
    replies = await asyncio.gather(*pulls)
    assert all(outcome(reply) == ("", [True, True], 0, 0) for reply in replies)
    assert all((puller.blocks[i] == expected[h]).all() for i, h in enumerate(hashes))
    await settled(holder)


async def test_peers_pull_from_each_other_at_once(pair, make_hashes):
    left, right = pair
    await left.wait_until_known(right)
    mine, theirs = make_hashes(20, seed=3), make_hashes(20, seed=4)
    left_blocks, right_blocks = left.seal(mine, seed=1), right.seal(theirs, seed=2)
    replies = await asyncio.gather(
        left.pull(right, theirs, list(range(20, 40))), right.pull(left, mine, list(range(20, 40)))
    )
    assert all(outcome(reply) == ("", [True] * 20, 0, 0) for reply in replies)
    assert all((left.blocks[20 + i] == right_blocks[h]).all() for i, h in enumerate(theirs))
    assert all((right.blocks[20 + i] == left_blocks[h]).all() for i, h in enumerate(mine))


MALFORMED = [
    ({"block_ids": [0, 1, 1]}, "destination of two"),
    ({"block_ids": [0, 1]}, "3 hashes for 2 slots"),
    ({"block_ids": [0, 1, 64]}, "block id 64 of an arena of 64"),
    ({"block_ids": [0, 1, -1]}, "block id -1"),
    ({"block_hashes": b"short"}, "not a multiple"),
    ({"block_hashes": b"", "block_ids": []}, "0 hashes"),
]


async def test_malformed_pulls_are_refused_as_such(pair, make_hashes):
    node, _ = pair
    for changes, complaint in MALFORMED:
        request = node.pull_request(None, make_hashes(3), [0, 1, 2])
        for name, value in changes.items():
            request.ClearField(name)
            request.MergeFrom(pb.PullRequest(**{name: value}))
        with pytest.raises(InvalidRequest, match=complaint):
            await node.pulls.pull(request)


async def test_what_peers_ask_is_checked_before_anything_is_done(pair, make_hashes):
    holder, _ = pair
    hashes = make_hashes(2)
    holder.seal(hashes)
    good = pb.FetchRequest(
        fingerprint="model-a", incarnation=holder.attached.transfer_incarnation, block_hashes=join_hashes(hashes)
    )
    async with open_channel(holder.attached.fetch_address) as channel:
        stub = rpc.KvFetchStub(channel)

        async def first_reply(**changes):
            request = pb.FetchRequest()
            request.CopyFrom(good)
            for name, value in changes.items():
                setattr(request, name, value)
            call = stub.Fetch(request)
            reply = await call.read()
            call.cancel()
            return reply

        assert (await first_reply(incarnation="0123")).refused == StaleIncarnation.code
        assert (await first_reply(fingerprint="model-b")).refused == FingerprintMismatch.code
        for raw in (b"", b"x" * 17, bytes(16 * 8193)):
            assert (await first_reply(block_hashes=raw)).refused == InvalidRequest.code
        assert holder.host.num_pins == 0
        granted = await first_reply()
        assert (list(granted.available), granted.block_bytes, len(granted.token)) == ([0, 1], holder.block_bytes, 32)
        again = await first_reply()
        assert {granted.token, granted.transfer_id}.isdisjoint({again.token, again.transfer_id})
    await settled(holder)  # the grant was never used: its pins went with the call
