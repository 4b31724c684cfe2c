"""The directory on a real Redis Cluster of three nodes."""

import asyncio
import contextlib
import os
import random
import signal
import socket
import time

import pytest
from redis.asyncio.cluster import NodesManager

from shared.directory.client import Directory
from shared.directory.records import GatewayRecord
from shared.directory.redis_server import RedisServer
from shared.identity import Fingerprint, extend_hashes, namespace_hash, new_incarnation
from tests.directory.waiting import assert_cancelled_at_any_turn, until, until_found

pytestmark = pytest.mark.timeout(60)

HASHES = extend_hashes(namespace_hash(Fingerprint("model")), list(range(16 * 300)), 16)
NUM_SLOTS = 16384


def command(url, *arguments):
    """One reply line, from a server without any client library."""
    host, _, port = url.removeprefix("redis://").removesuffix("/0").partition(":")
    request = f"*{len(arguments)}\r\n" + "".join(f"${len(str(a))}\r\n{a}\r\n" for a in arguments)
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(request.encode())
        return connection.recv(1 << 16).decode()


def free_port():
    """Of a node that talks to the others at its port + 10,000; below what the kernel gives to connections."""
    while True:
        port = random.randrange(20_000, 22_700)
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10_000))
            return port


class Cluster:
    """Masters with a third of the slots each, then as many replicas of them, in order."""

    def __init__(self, folder, stack, num_masters=3, num_replicas=0, **settings):
        settings = {"cluster-enabled": "yes", "cluster-node-timeout": "1000", **settings}
        self.servers = [stack.enter_context(RedisServer(settings=settings)) for _ in range(num_masters + num_replicas)]
        self.urls = [server.start(folder / str(index), free_port()) for index, server in enumerate(self.servers)]
        for index, url in enumerate(self.urls):
            if index < num_masters:
                first, end = (NUM_SLOTS * number // num_masters for number in (index, index + 1))
                assert command(url, "CLUSTER", "ADDSLOTS", *range(first, end)) == "+OK\r\n"
            if index:
                host, port = self.urls[0].removeprefix("redis://").removesuffix("/0").split(":")
                assert command(url, "CLUSTER", "MEET", host, port) == "+OK\r\n"
        self.until(lambda: all(self._info(url, f"cluster_known_nodes:{len(self.urls)}") for url in self.urls))
        for index in range(num_replicas):
            master_id = command(self.urls[index], "CLUSTER", "MYID").split()[1]
            replicate = (self.urls[num_masters + index], "CLUSTER", "REPLICATE", master_id)
            self.until(lambda replicate=replicate: command(*replicate) == "+OK\r\n")
        self.until(lambda: all(self._info(url, "cluster_state:ok") for url in self.urls))

    def url(self, *nodes):
        addresses = ",".join(self.urls[node].removeprefix("redis://").removesuffix("/0") for node in nodes)
        return f"redis+cluster://{addresses}"

    def master_of(self, key):
        return 3 * int(command(self.urls[0], "CLUSTER", "KEYSLOT", key)[1:]) // NUM_SLOTS

    def until_replicated(self):
        masters = self.urls[:3]
        self.until(lambda: all("state=online" in command(url, "INFO", "replication") for url in masters))

    @staticmethod
    def until(condition):
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, "the cluster did not form"
            time.sleep(0.05)

    @staticmethod
    def _info(url, line):
        return line in command(url, "CLUSTER", "INFO")


@pytest.fixture
def make_cluster(tmp_path):
    with contextlib.ExitStack() as stack:
        yield lambda **options: Cluster(tmp_path, stack, **options)


async def test_records_hints_and_farewell_work_across_slots(make_cluster):
    cluster_url = make_cluster().url(0)
    record = GatewayRecord("gw", new_incarnation(), "127.0.0.1:8000", 4)
    options = {"heartbeat_s": 0.3, "lookup_timeout_s": 0.5}
    async with Directory(cluster_url, **options) as reader:
        async with Directory(cluster_url, **options) as directory:
            await until(lambda: directory.healthy)
            await directory.announce(lambda: record)
            holder = await directory.claim_holder(new_incarnation(), lambda: HASHES[:200])
            await until(lambda: reader.gateways() == (record,) and holder.num_unpublished == 0)
            holder.publish(HASHES[200:250], HASHES[230:240])
            await until(lambda: holder.num_unpublished == 0)
            await until_found(reader, HASHES, {holder.index: 230}, timeout_s=20)
        await until(lambda: not reader.gateways() and reader.healthy)
        await until_found(reader, HASHES, {}, timeout_s=20)


async def test_any_node_that_lives_leads_to_the_cluster(make_cluster):
    cluster = make_cluster()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        dead = taken.getsockname()[1]
    url = cluster.url(2).replace("redis+cluster://", f"redis+cluster://127.0.0.1:{dead},")
    async with Directory(url, heartbeat_s=0.3, lookup_timeout_s=0.5) as directory:
        await until(lambda: directory.healthy)


async def test_a_question_to_a_cluster_can_be_cancelled_at_any_time(make_cluster):
    await assert_cancelled_at_any_turn(make_cluster().url(0))


async def test_a_map_that_takes_longer_to_read_than_a_command_may_is_read_all_the_same(make_cluster, monkeypatch):
    learn = NodesManager.initialize

    async def learn_late(*args, **options):
        await asyncio.sleep(1.5)
        await learn(*args, **options)

    monkeypatch.setattr(NodesManager, "initialize", learn_late)
    async with Directory(make_cluster().url(0), heartbeat_s=0.3, background_timeout_s=0.5) as directory:
        assert not directory.healthy
        await until(lambda: directory.healthy)


async def test_a_cluster_that_is_not_there_yet_is_like_no_redis():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        dead = taken.getsockname()[1]
    async with Directory(f"redis+cluster://127.0.0.1:{dead}", heartbeat_s=0.3) as directory:
        assert not directory.healthy
        assert await directory.longest_prefixes(HASHES) == {}


async def test_a_password_opens_a_cluster_and_a_wrong_one_is_like_no_redis(make_cluster):
    cluster = make_cluster()
    for url in cluster.urls:
        assert command(url, "CONFIG", "SET", "requirepass", "secret") == "+OK\r\n"
    guarded = cluster.url(0, 1).replace("redis+cluster://", "redis+cluster://:{}@")
    async with Directory(guarded.format("secret"), heartbeat_s=0.3) as directory:
        await until(lambda: directory.healthy)
    async with Directory(guarded.format("guess"), heartbeat_s=0.3) as directory:
        assert not directory.healthy


async def test_after_the_death_of_a_master_the_directory_lives_on_with_its_replica(make_cluster):
    cluster = make_cluster(num_replicas=3)
    record = GatewayRecord("gw", new_incarnation(), "127.0.0.1:8000", 4)
    # All that says who is there lies with one master, and is lost to everybody until its replica has taken over.
    master = cluster.master_of("tandem:{members}:generation")
    async with Directory(cluster.url(0, 1, 2), heartbeat_s=0.3, lookup_timeout_s=0.5) as directory:
        await directory.announce(lambda: record)
        holder = await directory.claim_holder(new_incarnation(), lambda: HASHES[:200])
        await until(lambda: directory.gateways() == (record,) and holder.num_unpublished == 0)
        cluster.until_replicated()
        os.kill(cluster.servers[master].pid, signal.SIGKILL)
        await until(lambda: not directory.healthy)
        assert directory.gateways() == (record,)
        await until(lambda: directory.healthy, timeout_s=30)
        assert directory.gateways() == (record,)
        await until_found(directory, HASHES, {holder.index: 200}, timeout_s=20)
