"""The directory on a real Redis Cluster of three nodes."""

import asyncio
import contextlib
import socket
import time

import pytest

from shared.directory.client import Directory
from shared.directory.records import GatewayRecord
from shared.directory.redis_server import RedisServer
from shared.identity import Fingerprint, new_incarnation, prompt_hashes

pytestmark = pytest.mark.timeout(60)

HASHES = prompt_hashes(Fingerprint("model"), "", list(range(16 * 300)), 16)
NUM_SLOTS = 16384


def command(url, *arguments):
    """One reply line, from a server without any client library."""
    host, _, port = url.removeprefix("redis://").removesuffix("/0").partition(":")
    request = f"*{len(arguments)}\r\n" + "".join(f"${len(str(a))}\r\n{a}\r\n" for a in arguments)
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(request.encode())
        return connection.recv(1 << 16).decode()


@pytest.fixture
def cluster_url(tmp_path):
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(RedisServer(settings={"cluster-enabled": "yes", "cluster-node-timeout": "2000"}))
            for _ in range(3)
        ]
        urls = [server.start(tmp_path / str(index)) for index, server in enumerate(servers)]
        for index, url in enumerate(urls):
            assert command(url, "CLUSTER", "ADDSLOTS", *range(index, NUM_SLOTS, 3)) == "+OK\r\n"
            if index:
                host, port = urls[0].removeprefix("redis://").removesuffix("/0").split(":")
                assert command(url, "CLUSTER", "MEET", host, port) == "+OK\r\n"
        deadline = time.monotonic() + 15
        while not all("cluster_state:ok" in command(url, "CLUSTER", "INFO") for url in urls):
            assert time.monotonic() < deadline, "the cluster did not form"
            time.sleep(0.05)
        yield urls[0].replace("redis://", "redis+cluster://").removesuffix("/0")


async def until(condition, timeout_s=8.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


async def test_records_hints_and_farewell_work_across_slots(cluster_url):
    record = GatewayRecord("gw", new_incarnation(), "127.0.0.1:8000", 4)
    options = {"heartbeat_s": 0.3, "lookup_timeout_s": 0.5}
    async with Directory(cluster_url, **options) as reader:
        async with Directory(cluster_url, **options) as directory:
            assert directory.healthy
            await directory.announce(lambda: record)
            holder = await directory.claim_holder(new_incarnation(), lambda: HASHES[:200])
            await until(lambda: reader.gateways() == (record,) and holder.num_unpublished == 0)
            holder.publish(HASHES[200:250], HASHES[230:240])
            await until(lambda: holder.num_unpublished == 0)
            await asyncio.sleep(0.3)
            assert await reader.longest_prefixes(HASHES) == {holder.index: 230}
        await until(lambda: not reader.gateways())
        assert await reader.longest_prefixes(HASHES) == {}
        assert reader.healthy
