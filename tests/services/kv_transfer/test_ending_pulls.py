"""Cancel is not quiescence: a pull that the worker lost sight of is proven over before its slots are used again."""

import asyncio
import signal
import time

import pytest

from protos import kv_transfer_pb2 as pb
from services.kv_transfer.open_pulls import OpenPulls
from shared.errors import Cancelled, InvalidRequest, WorkerLost
from shared.worker.sidecar_link import Pull, SidecarLink, SidecarLost

BIG, NUM_BIG = 3 << 20, 24


async def test_an_end_waits_for_the_pull_and_one_that_never_began_never_will():
    pulls, steps = OpenPulls(), []

    async def pull():
        with pulls.running(("life", 7)):
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.shield(asyncio.sleep(0.05))
                steps.append("quiet")

    running = asyncio.create_task(pull())
    await asyncio.sleep(0.01)
    await pulls.end([("life", 7), ("life", 8)])
    steps.append("proven")
    assert steps == ["quiet", "proven"]
    assert running.cancelled() or running.cancelling()
    with pytest.raises(InvalidRequest), pulls.running(("life", 8)):
        pass
    with pulls.running(("another life", 8)):
        pass


@pytest.fixture
async def big_pair(cluster, make_hashes):
    holder, puller = await cluster.pair(num_blocks=NUM_BIG, block_bytes=BIG)
    hashes = make_hashes(NUM_BIG)
    for i, block_hash in enumerate(hashes):
        holder.blocks[i] = i + 1
        holder.host.sealed[block_hash] = i
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


@pytest.mark.e2e
async def test_a_real_transfer_cancelled_midway_writes_nothing_once_its_end_is_proven(big_pair):
    """The holder hangs in mid-transfer and goes on later: over UCX a cancelled receive alone would be written then."""
    holder, puller, hashes = big_pair
    request = puller.pull_request(holder, hashes, list(range(NUM_BIG)), timeout_s=60)
    request.pull_id = 41
    pulling = asyncio.ensure_future(puller.pulls.pull(request))
    await until_bytes_arrive(puller)
    holder.process.send_signal(signal.SIGSTOP)
    pulling.cancel()
    await puller.stub.EndPulls(pb.EndPullsRequest(pull_ids=[41]), timeout=10)
    puller.blocks[:] = 0
    holder.process.send_signal(signal.SIGCONT)
    await assert_left_alone(puller)
    assert pulling.cancelled()
    await holder.attach_again_if_cut_off()
    assert all((await puller.pull(holder, hashes, list(range(NUM_BIG)))).verified)


@pytest.mark.e2e
async def test_a_pull_that_another_call_ends_is_answered_and_leaves_its_neighbour_alone(big_pair):
    holder, puller, hashes = big_pair
    request = puller.pull_request(holder, hashes[:-1], list(range(NUM_BIG - 1)), timeout_s=60)
    request.pull_id = 42
    ended = asyncio.ensure_future(puller.pulls.pull(request))
    staying = asyncio.ensure_future(puller.pull(holder, hashes[-1:], [NUM_BIG - 1]))
    await until_bytes_arrive(puller)
    await puller.stub.EndPulls(pb.EndPullsRequest(pull_ids=[42]), timeout=10)
    with pytest.raises(Cancelled):
        await ended
    assert all((await staying).verified)


@pytest.mark.e2e
async def test_pulls_end_with_the_stream_that_asked_for_them(big_pair):
    """As when the worker dies."""
    holder, puller, hashes = big_pair
    half = NUM_BIG // 2
    pulls = [
        asyncio.ensure_future(puller.pull(holder, hashes[start : start + half], list(range(start, start + half))))
        for start in (0, half)
    ]
    await until_bytes_arrive(puller)
    puller.pulls.close()
    for pull in pulls:
        with pytest.raises(WorkerLost):
            await pull
    async with asyncio.timeout(30):
        for node in (puller, holder):
            while node.host.num_pins or (await node.transfer_status()).active_transfers:
                await asyncio.sleep(0.01)
    await assert_left_alone(puller)


@pytest.mark.e2e
@pytest.mark.parametrize("end", ["resumed", "killed"])
async def test_slots_of_a_pull_without_an_answer_come_back_when_its_kv_transfer_does(big_pair, end):
    """The kv_transfer hangs; the worker gives the pull up, keeps its slots apart, and gets them back with proof."""
    holder, puller, hashes = big_pair
    puller.call.cancel()
    quiet = []
    attach = pb.AttachRequest(
        worker_id="puller",
        incarnation="w",
        fingerprint="model-a",
        arena_path=str(puller.arena.path),
        num_blocks=NUM_BIG,
        block_bytes=BIG,
        host_socket="/nowhere",
        role="decode",
    )
    link = SidecarLink(puller.socket, attach, pull_timeout_s=0.5, sealed_hashes=list, on_quiet=quiet.extend)
    running = asyncio.create_task(link.run())
    await link.wait_attached()
    pulling = asyncio.ensure_future(
        link.pull(Pull("s", "holder", holder.attached.transfer_incarnation, hashes, list(range(NUM_BIG))))
    )
    await until_bytes_arrive(puller)
    puller.process.send_signal(signal.SIGSTOP)
    with pytest.raises(SidecarLost):
        await pulling
    assert quiet == []
    if end == "killed":
        puller.process.kill()
        await asyncio.to_thread(puller.process.wait)
        puller.start_process()
    else:
        puller.process.send_signal(signal.SIGCONT)
    started_s = time.monotonic()
    async with asyncio.timeout(20):
        while not quiet:
            await asyncio.sleep(0.01)
    print(f"proven {time.monotonic() - started_s:.2f} s after the kv_transfer was {end}")
    assert quiet == list(range(NUM_BIG))
    await assert_left_alone(puller)
    running.cancel()
    await link.close()
