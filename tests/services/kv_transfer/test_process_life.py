"""Start in any order, with or without Redis; leave cleanly; one process per socket."""

import asyncio
import os
import re
import struct
import subprocess
import sys

import httpx
import pytest

from loadtest.fuzz_ucx import ucx_port
from protos import kv_transfer_pb2 as pb
from services.kv_transfer.service import EXIT_TRANSPORT_FAILED
from shared.identity import join_hashes

pytestmark = [pytest.mark.timeout(120), pytest.mark.e2e]


async def exit_code(node, timeout_s=15):
    return await asyncio.to_thread(node.process.wait, timeout_s)


async def eventually(condition, timeout_s=10):
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)


async def test_over_shared_memory_too_and_sigterm_ends_it_cleanly_with_a_worker_attached(cluster, make_hashes):
    holder, puller = pair = await cluster.pair(ucx_tls="shm")
    hashes = make_hashes(8)
    holder.seal(hashes)
    assert all((await puller.pull(holder, hashes, list(range(8)))).verified)
    assert (await puller.transfer_status()).transport == "ucx:shm"
    for node in pair:
        node.process.terminate()
    assert [await exit_code(node) for node in pair] == [0, 0]
    assert "Traceback" not in holder.log_text() + puller.log_text()


async def test_owed_blocks_are_served_while_draining(pair, make_hashes):
    """A prefill worker and its kv_transfer are told to stop while a decode worker is still fetching, chunk by chunk."""
    holder, puller = pair
    hashes = make_hashes(20)
    holder.seal(hashes)
    holder.process.terminate()
    for i in range(0, 20, 5):
        reply = await puller.pull(holder, hashes[i : i + 5], list(range(i, i + 5)))
        assert (reply.error, list(reply.verified)) == ("", [True] * 5)
        await asyncio.sleep(0.1)
    holder.call.cancel()  # its worker is done
    assert await exit_code(holder, 3) == 0


async def test_the_worker_may_come_first(cluster):
    node = await cluster("late", attach=False)
    node.process.kill()
    node.process.wait()
    attaching = asyncio.create_task(node.attach())
    await asyncio.sleep(0.5)
    assert not attaching.done()
    node.start_process()
    await attaching
    assert node.attached.transfer_incarnation


async def test_it_serves_its_worker_without_redis_and_joins_when_redis_comes(cluster, make_hashes, redis_server):
    url = redis_server.url
    port = int(url.rpartition(":")[2].partition("/")[0])
    redis_server.stop()
    node = await cluster("alone", redis_url=url)
    hashes = make_hashes(5)
    node.seal(hashes)
    assert await node.save(hashes) == [True] * 5
    assert all((await node.pull(None, hashes, list(range(10, 15)))).verified)
    reply = await node.pull(node, hashes, list(range(20, 25)))  # its own name means the tier, too
    assert all(reply.verified)
    redis_server.start(node.directory / "redis", port)
    peer = await cluster("peer", redis_url=url)
    await peer.wait_until_known(node)
    assert all((await peer.pull(node, hashes, list(range(5)))).verified)


async def test_sigterm_without_redis_ends_it_too(cluster, redis_server):
    node = await cluster("alone", redis_url=redis_server.url)
    redis_server.stop()
    node.call.cancel()
    node.process.terminate()
    assert await exit_code(node) == 0


async def test_hints_follow_the_worker_and_outlive_it_in_the_tier(cluster, make_hashes, open_directory):
    node = await cluster("n")
    hashes = make_hashes(6)
    node.seal(hashes)
    async with open_directory() as directory:
        publishing = node.stub.Publish()
        await publishing.write(pb.BlockEvents(reset=True, sealed=join_hashes(hashes)))

        async def prefix():
            matches = await directory.find_holders(hashes)
            return [(match.transfer.worker_id, match.num_blocks) for match in matches]

        async def until(expected):
            async with asyncio.timeout(30):
                while await prefix() != expected:
                    await asyncio.sleep(0.02)

        await until([("n", 6)])
        await publishing.write(pb.BlockEvents(evicted=join_hashes(hashes[4:])))
        await until([("n", 4)])
        assert await node.save(hashes[:2]) == [True, True]
        node.call.cancel()  # the worker is gone: its arena counts no more, the tier does
        await until([("n", 2)])
        node.process.terminate()
        assert await exit_code(node) == 0
        await until([])
        await eventually(lambda: not directory.transfers())


async def test_a_connection_that_makes_ucx_spin_ends_the_process(cluster):
    """More is said on connecting than UCX has room for: its thread turns at a full core from then on."""
    node = await cluster("n", ucx_admit="any")
    _, writer = await asyncio.open_connection("127.0.0.1", ucx_port(node.directory / "n.log"))
    writer.write(struct.pack("<Q", 1 << 20) + bytes(16 << 10))
    assert await exit_code(node, 60) == EXIT_TRANSPORT_FAILED
    assert "has not slept" in node.log_text()
    writer.transport.abort()


async def test_a_second_process_waits_for_the_first_ones_end(cluster):
    node = await cluster("n")
    first = node.process
    node.start_process()
    await asyncio.sleep(2.0)
    assert (first.poll(), node.process.poll()) == (None, None)
    assert (await node.transfer_status()).pid == first.pid
    first.kill()
    await asyncio.to_thread(first.wait)
    await node.call.code()  # its channel knows
    await node.attach()
    assert (await node.transfer_status()).pid == node.process.pid


async def test_a_new_life_of_the_worker_takes_the_place_of_the_old(cluster, make_hashes):
    node = await cluster("n")
    hashes = make_hashes(3)
    node.seal(hashes)
    assert all(await node.save(hashes))
    old_call = node.call
    await node.attach()
    assert node.attached.tier_blocks == 3
    assert await asyncio.wait_for(old_call.code(), 30)
    assert all((await node.pull(None, hashes, [10, 11, 12])).verified)


async def test_an_old_incarnation_is_refused_by_comparison(pair, make_hashes):
    holder, puller = pair
    hashes = make_hashes(2)
    holder.seal(hashes)
    request = puller.pull_request(holder, hashes, [0, 1])
    request.holder_incarnation = "0123456789abcdef"
    reply = await puller.pulls.pull(request)
    assert reply.error.startswith("stale_incarnation")
    request.holder_incarnation = ""  # whichever lives now
    assert all((await puller.pulls.pull(request)).verified)
    request.holder_id = "nobody"
    assert (await puller.pulls.pull(request)).error.startswith("worker_lost")


async def test_workers_of_another_fingerprint_are_not_asked(cluster, make_hashes):
    ours, theirs = await asyncio.gather(cluster("ours"), cluster("theirs", fingerprint="model-b"))
    async with asyncio.timeout(30):
        while "fingerprint_mismatch" not in (error := (await ours.pull(theirs, make_hashes(1), [0])).error):
            assert "worker_lost" in error or "holds blocks of" in error
            await asyncio.sleep(0.05)


async def test_metrics_and_probes_are_served(cluster, make_hashes):
    node = await cluster("n", metrics_port=0)
    hashes = make_hashes(2)
    node.seal(hashes)
    await node.save(hashes)
    await node.pull(None, [*hashes, make_hashes(1, seed=9)[0]], [10, 11, 12])
    url = re.search(r"metrics=(http://[^ ]+)", node.log_text())[1]
    async with httpx.AsyncClient() as client:
        page = (await client.get(f"{url}/metrics")).text
        assert 'tandem_transfer_pulled_blocks_total{outcome="verified"} 2.0' in page
        assert 'tandem_transfer_pulled_blocks_total{outcome="missing"} 1.0' in page
        assert "tandem_host_tier_blocks 2.0" in page
        assert (await client.get(f"{url}/live")).status_code == 200
        assert (await client.get(f"{url}/ready")).status_code == 200
        node.call.cancel()
        async with asyncio.timeout(30):
            while (reply := await client.get(f"{url}/ready")).status_code == 200:
                await asyncio.sleep(0.02)
        assert "no worker" in reply.json()["reason"]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"UCX_TLS": "carrier-pigeon"}, "UCX does not start"),
        ({"TYPO": "1"}, "unknown setting TANDEM_TRANSFER_TYPO"),
        ({"TIER_BYTES": "-1"}, "TIER_BYTES"),
        ({"HOST": "203.0.113.7"}, "203.0.113.7"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(tmp_path_factory, settings, complaint):
    directory = tmp_path_factory.mktemp("kvt")
    environment = {
        **os.environ,
        "TANDEM_TRANSFER_WORKER_ID": "n",
        "TANDEM_TRANSFER_SOCKET": str(directory / "s.sock"),
        "TANDEM_TRANSFER_LOG_LEVEL": "error",
        **{f"TANDEM_TRANSFER_{name}": value for name, value in settings.items()},
    }
    command = [sys.executable, "-m", "services.kv_transfer"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 2
    assert complaint.lower() in result.stderr.lower()
    assert "Traceback" not in result.stderr
