"""Peers and callers that die, hang or leave in mid-transfer. Once a pull has ended its slots must be left alone."""

import asyncio
import signal

import pytest

from shared.errors import WorkerLost

pytestmark = [pytest.mark.timeout(120), pytest.mark.e2e]

BIG = 3 << 20
NUM_BIG = 32


async def settled(node):
    async with asyncio.timeout(30):
        while node.host.num_pins or (await node.transfer_status()).active_transfers:
            await asyncio.sleep(0.01)


@pytest.fixture(params=["tcp", "shm"])
async def big_pair(request, cluster, make_hashes):
    """Two nodes with blocks big enough to be caught in mid-transfer; through shared memory they come in two stripes."""
    holder, puller = await cluster.pair(num_blocks=NUM_BIG, block_bytes=BIG, ucx_tls=request.param)
    hashes = make_hashes(NUM_BIG)
    rows = holder.seal(hashes[:1])[hashes[0]]
    for i, block_hash in enumerate(hashes):
        holder.blocks[i] = rows
        holder.blocks[i, :8] = i + 1
        holder.host.sealed[block_hash] = i
    # Warm: connections are up and pages are mapped, so that the next pull is all transfer.
    assert all((await puller.pull(holder, hashes, list(range(NUM_BIG)))).verified)
    puller.blocks[:] = 0
    return holder, puller, hashes


async def until_bytes_arrive(node):
    async with asyncio.timeout(30):
        while not node.blocks[:, 0].any():
            await asyncio.sleep(0)


async def assert_left_alone(node):
    node.blocks[:] = 0
    for _ in range(10):
        await asyncio.sleep(0.05)
        assert not node.blocks.any()


async def test_a_killed_holder_is_an_error_at_once_and_the_puller_lives(big_pair):
    holder, puller, hashes = big_pair
    pulling = asyncio.ensure_future(puller.pull(holder, hashes, list(range(NUM_BIG))))
    await until_bytes_arrive(puller)
    holder.process.kill()
    reply = await asyncio.wait_for(pulling, 30)
    assert reply.error
    assert not any(reply.verified)
    await assert_left_alone(puller)
    assert (await puller.transfer_status()).active_transfers == 0
    holder.process.wait()
    holder.start_process()  # another life on the same socket
    holder.call.cancel()
    await holder.attach()
    await puller.wait_until_known(holder)
    assert all((await puller.pull(holder, hashes, list(range(NUM_BIG)))).verified)


async def test_a_hung_holder_ends_with_the_deadline_and_never_writes_again(big_pair):
    holder, puller, hashes = big_pair
    # Sooner than a keepalive, which is answered within 0.8 s or ends the grant itself.
    pulling = asyncio.ensure_future(puller.pull(holder, hashes, list(range(NUM_BIG)), timeout_s=0.5))
    await until_bytes_arrive(puller)
    holder.process.send_signal(signal.SIGSTOP)
    reply = await asyncio.wait_for(pulling, 30)
    assert "request_timeout" in reply.error
    assert 0.45 < reply.seconds < 3
    puller.blocks[:] = 0
    holder.process.send_signal(signal.SIGCONT)
    await assert_left_alone(puller)
    await settled(holder)
    async with asyncio.timeout(20):  # either side may find out late that the stop outlasted the keepalive
        while not all((reply := await puller.pull(holder, hashes, list(range(NUM_BIG)))).verified):
            assert reply.mismatched == 0
            await asyncio.sleep(0.05)
            await holder.attach_again_if_cut_off()


async def test_a_hung_holder_is_noticed_by_keepalive_long_before_a_long_deadline(big_pair):
    holder, puller, hashes = big_pair
    pulling = asyncio.ensure_future(puller.pull(holder, hashes, list(range(NUM_BIG)), timeout_s=60.0))
    await until_bytes_arrive(puller)
    holder.process.send_signal(signal.SIGSTOP)
    reply = await asyncio.wait_for(pulling, 15)
    assert reply.error.startswith("worker_lost")  # of a stripe that was granted, or of one that was not yet
    holder.process.send_signal(signal.SIGCONT)
    await assert_left_alone(puller)


async def test_a_cancelled_pull_releases_the_holders_pins_and_the_slots(big_pair):
    holder, puller, hashes = big_pair
    pulling = asyncio.ensure_future(puller.pull(holder, hashes, list(range(NUM_BIG)), timeout_s=60))
    await until_bytes_arrive(puller)
    pulling.cancel()
    await settled(puller)
    await assert_left_alone(puller)
    await settled(holder)
    assert all((await puller.pull(holder, hashes, list(range(NUM_BIG)))).verified)


async def test_a_killed_puller_leaves_no_pins(big_pair):
    holder, puller, hashes = big_pair
    pulling = asyncio.ensure_future(puller.pull(holder, hashes, list(range(NUM_BIG)), timeout_s=60))
    await until_bytes_arrive(puller)
    assert holder.host.num_pins >= NUM_BIG // 2  # of one stripe at least
    puller.process.kill()
    with pytest.raises(WorkerLost):
        await asyncio.wait_for(pulling, 30)
    await settled(holder)
    assert holder.process.poll() is None


async def test_a_worker_that_lets_go_of_its_pin_breaks_the_transfer_off(big_pair):
    """Bytes that are not pinned any more may change: the holder stops sending them."""
    holder, puller, hashes = big_pair
    pulling = asyncio.ensure_future(puller.pull(holder, hashes, list(range(NUM_BIG))))
    await until_bytes_arrive(puller)
    await holder.host_server.stop(0)
    reply = await asyncio.wait_for(pulling, 30)
    # The last byte may have left before the pin broke; else nothing counts.
    assert all(reply.verified) or (reply.error and not any(reply.verified))
    assert (await holder.transfer_status()).active_transfers == 0


async def test_a_worker_that_does_not_answer_pins_is_as_if_it_had_no_blocks(pair, make_hashes):
    holder, puller = pair
    hashes = make_hashes(4)
    expected = holder.seal(hashes)
    assert all(await holder.save(hashes[:2]))
    await holder.host_server.stop(0)
    reply = await puller.pull(holder, hashes, [0, 1, 2, 3])
    assert (list(reply.verified), reply.missing, reply.error) == ([True, True, False, False], 2, "")
    assert (puller.blocks[0] == expected[hashes[0]]).all()
