"""The directory with its Redis paused, stopped, flushed or slow: nothing raises, little waits, all recovers."""

import asyncio
import os
import signal
import socket
import time
from contextlib import asynccontextmanager

import pytest
from redis.asyncio import Redis

from shared.directory.client import Directory
from shared.directory.records import GatewayRecord
from shared.identity import Fingerprint, extend_hashes, namespace_hash, new_incarnation
from tests.directory.waiting import until, until_found

pytestmark = pytest.mark.timeout(60)

HASHES = extend_hashes(namespace_hash(Fingerprint("model")), list(range(160)), 16)
GATEWAY = GatewayRecord("gw", new_incarnation(), "127.0.0.1:8000", 4)


async def timed_lookup(directory):
    started = time.monotonic()
    found = await directory.longest_prefixes(HASHES)
    return found, time.monotonic() - started


@asynccontextmanager
async def member(url, **options):
    """A directory with a record announced and blocks published."""
    async with Directory(url, **{"heartbeat_s": 0.3, **options}) as directory:
        await directory.announce(lambda: GATEWAY)
        holder = await directory.claim_holder(new_incarnation(), lambda: HASHES[:6])
        if directory.healthy:
            await until(lambda: directory.gateways() and holder.num_unpublished == 0)
            await until_found(directory, HASHES, {holder.index: 6})
        yield directory, holder


async def test_a_paused_redis_costs_one_time_out_and_then_nothing(redis_server):
    async with member(redis_server.url) as (directory, holder):
        os.kill(redis_server.pid, signal.SIGSTOP)
        try:
            waits = []
            began = time.monotonic()
            while time.monotonic() - began < 3:
                found, wait_s = await timed_lookup(directory)
                assert found == {}
                waits.append(wait_s)
                await asyncio.sleep(0.01)
            assert sum(wait_s > 0.03 for wait_s in waits) <= 6  # one a second, and some room for a busy machine
            assert max(waits) < 0.5
            assert not directory.healthy
            assert directory.gateways() == (GATEWAY,)
        finally:
            os.kill(redis_server.pid, signal.SIGCONT)
        await until(lambda: directory.healthy)
        await until_found(directory, HASHES, {holder.index: 6})
        assert directory.gateways() == (GATEWAY,)


async def test_many_requests_at_once_all_return_within_one_time_out(redis_server):
    async with member(redis_server.url) as (directory, _):
        os.kill(redis_server.pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            assert await asyncio.gather(*(directory.longest_prefixes(HASHES) for _ in range(200))) == [{}] * 200
            assert time.monotonic() - started < 5
        finally:
            os.kill(redis_server.pid, signal.SIGCONT)


async def test_lookups_after_a_time_out_never_see_the_late_reply_of_another(redis_server):
    other = extend_hashes(namespace_hash(Fingerprint("other")), list(range(160)), 16)
    async with member(redis_server.url, lookup_timeout_s=1) as (directory, holder):
        os.kill(redis_server.pid, signal.SIGSTOP)
        assert await directory.longest_prefixes(HASHES) == {}
        os.kill(redis_server.pid, signal.SIGCONT)
        await until(lambda: directory.healthy)
        for _ in range(50):
            assert await directory.longest_prefixes(other) == {}
            assert await directory.longest_prefixes(HASHES) == {holder.index: 6}


async def test_connections_that_redis_closed_while_they_were_idle_cost_no_lookup(redis_server):
    async with member(redis_server.url, heartbeat_s=30, lookup_timeout_s=5) as (directory, holder):
        await asyncio.gather(*(directory.longest_prefixes(HASHES) for _ in range(8)))
        async with Redis.from_url(redis_server.url) as other:
            await other.client_kill_filter(_type="normal", skipme=True)
        assert await directory.longest_prefixes(HASHES) == {holder.index: 6}


async def test_a_restarted_empty_redis_is_filled_again_and_nobody_vanishes_meanwhile(redis_server, tmp_path):
    port = int(redis_server.url.rpartition(":")[2].partition("/")[0])
    async with member(redis_server.url) as (directory, holder), Directory(redis_server.url, heartbeat_s=0.3) as reader:
        await until(reader.gateways)
        redis_server.stop()
        await asyncio.sleep(0.5)
        assert (await timed_lookup(reader))[0] == {}
        assert reader.gateways() == (GATEWAY,)
        redis_server.start(tmp_path / "again", port)
        began = time.monotonic()
        while time.monotonic() - began < 2:
            assert reader.gateways() == (GATEWAY,)
            await asyncio.sleep(0.02)
        await until_found(reader, HASHES, {holder.index: 6})
        await until(lambda: directory.healthy)
        await until(lambda: reader.healthy)


async def test_a_flush_is_noticed_and_everything_published_again(redis_server):
    async with member(redis_server.url) as (directory, holder), Directory(redis_server.url, heartbeat_s=0.3) as reader:
        await until(reader.gateways)
        with socket.create_connection(("127.0.0.1", int(redis_server.url[18:].split("/")[0]))) as connection:
            connection.sendall(b"FLUSHALL\r\n")
            assert connection.recv(16) == b"+OK\r\n"
        began = time.monotonic()
        while time.monotonic() - began < 1.5:
            assert reader.gateways() == (GATEWAY,)
            await asyncio.sleep(0.01)
        await until_found(reader, HASHES, {holder.index: 6})
        await until(lambda: directory.healthy)


async def test_a_process_that_starts_before_redis_joins_when_redis_comes(redis_server, tmp_path):
    port = int(redis_server.url.rpartition(":")[2].partition("/")[0])
    redis_server.stop()
    async with member(redis_server.url) as (directory, holder):
        assert not directory.healthy
        assert holder.index == -1
        holder.publish(HASHES, [])
        assert (await timed_lookup(directory))[1] < 0.2
        redis_server.start(tmp_path / "later", port)
        await until(lambda: directory.healthy and directory.gateways())
        await until_found(directory, HASHES, {0: 6})


async def test_changes_during_an_outage_reach_redis_after_it(redis_server):
    async with member(redis_server.url, background_timeout_s=0.3) as (directory, holder):
        os.kill(redis_server.pid, signal.SIGSTOP)
        holder.publish(HASHES[6:8], HASHES[3:4])
        await asyncio.sleep(1)
        os.kill(redis_server.pid, signal.SIGCONT)
        await until_found(directory, HASHES, {holder.index: 3})
        holder.publish(HASHES[3:4], [])
        await until_found(directory, HASHES, {holder.index: 8})


async def test_closing_with_redis_gone_ends_promptly(redis_server):
    async with member(redis_server.url) as (directory, _):
        redis_server.stop()
        started = time.monotonic()
        await directory.close()
        assert time.monotonic() - started < 10
