"""Redis paused, slow, flushed, killed, under load: no request fails, no token is wrong, reuse comes back (F29, F31)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import threading
import time

import httpx
import pytest

from loadtest.detection_bench import Cluster
from shared.directory.redis_server import RedisServer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

PROMPTS = [f"Report number {n} was read twice and filed. Nobody asked for a second copy. " * 12 for n in range(4)]
STREAMS = 4


class SlowProxy(threading.Thread):
    """Stands between the suite and its Redis; `delay_s` is added to everything that goes to Redis."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._target = port
        self.delay_s = 0.0
        self._loop = asyncio.new_event_loop()
        self._up = threading.Event()
        self.port = 0
        self.start()
        self._up.wait(10)

    def run(self) -> None:
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._up.set()
        await server.serve_forever()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._pipe(reader, inner_writer, True), self._pipe(inner_reader, writer, False))

    async def _pipe(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, is_delayed: bool) -> None:
        with contextlib.suppress(OSError):
            while chunk := await source.read(1 << 16):
                if is_delayed and self.delay_s:
                    await asyncio.sleep(self.delay_s)
                target.write(chunk)
        target.close()


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    with RedisServer() as server:
        server.start(tmp_path_factory.mktemp("outages"))
        yield server


@pytest.fixture(scope="module")
def proxy(redis):
    return SlowProxy(int(redis.url.rpartition(":")[2].partition("/")[0]))


@pytest.fixture(scope="module")
def cluster(start_another, proxy):
    options = ("--prefill", "1", "--decode", "1", "--threads", "1", "--kv-cache-bytes", "32MiB")
    suite = start_another(*options, "--redis-url", f"redis://127.0.0.1:{proxy.port}/0")
    return Cluster(suite.run_dir)


class Load:
    """Asks the same prompts over and over, under ever new salts; every answer must be the undisturbed one."""

    _salts = itertools.count()

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.expected = [self._ask(prompt)["choices"][0]["text"] for prompt in PROMPTS]
        self.served, self.wrong, self.failed, self.slowest_s = 0, 0, [], 0.0
        self._over = threading.Event()

    def _ask(self, prompt: str) -> dict:
        salt = f"salt-{next(self._salts)}"
        return self.cluster.complete(prompt=prompt, temperature=0, cache_salt=salt, max_tokens=8, timing=True)

    def _stream(self) -> None:
        for prompt, expected in itertools.cycle(zip(PROMPTS, self.expected, strict=True)):
            if self._over.is_set():
                return
            started = time.monotonic()
            try:
                text = self._ask(prompt)["choices"][0]["text"]
            except httpx.HTTPError as exc:
                self.failed.append(repr(exc))
                continue
            self.served += 1
            self.wrong += text != expected
            self.slowest_s = max(self.slowest_s, time.monotonic() - started)

    @contextlib.contextmanager
    def running(self):
        threads = [threading.Thread(target=self._stream, daemon=True) for _ in range(STREAMS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in threads:
                thread.join(60)
        assert self.failed == []
        assert self.wrong == 0
        assert self.served >= STREAMS

    def until_reuse(self) -> None:
        deadline = time.monotonic() + 30
        while self._ask(PROMPTS[0])["timing"]["sessions"][0]["mode"] != "remote_prefill":
            assert time.monotonic() < deadline, "no remote reuse again"
            time.sleep(0.2)


def send(server: RedisServer, command: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2].partition("/")[0]))) as connection:
        connection.sendall(command + b"\r\n")
        return connection.recv(64)


def test_a_paused_redis(cluster, redis):
    load = Load(cluster)
    with load.running():
        os.kill(redis.pid, signal.SIGSTOP)
        time.sleep(5)
        os.kill(redis.pid, signal.SIGCONT)
        time.sleep(1)
    load.until_reuse()


@pytest.mark.parametrize("delay_s", [0.03, 0.3])
def test_a_slow_redis(cluster, proxy, delay_s):
    load = Load(cluster)
    with load.running():
        proxy.delay_s = delay_s
        time.sleep(4)
        proxy.delay_s = 0.0
        time.sleep(1)
    load.until_reuse()


def test_a_flushed_redis(cluster, redis):
    load = Load(cluster)
    with load.running():
        for _ in range(3):
            assert send(redis, b"FLUSHALL") == b"+OK\r\n"
            time.sleep(1)
    load.until_reuse()


def test_a_redis_that_is_killed_and_comes_back_empty(cluster, redis, tmp_path):
    port = int(redis.url.rpartition(":")[2].partition("/")[0])
    load = Load(cluster)
    with load.running():
        os.kill(redis.pid, signal.SIGKILL)
        redis.stop()
        time.sleep(4)
        redis.start(tmp_path / "again", port)
        time.sleep(1)
    load.until_reuse()


def test_steps_are_no_slower_while_redis_hangs(cluster, redis):
    """What is published waits in memory; nobody on the way of a token waits for Redis."""

    def step_s() -> float:
        timings = [
            cluster.complete(prompt="Once upon a time", temperature=0, max_tokens=128, ignore_eos=True, timing=True)
            for _ in range(3)
        ]
        spans = [t["timing"]["sessions"][0] for t in timings]
        return min(s["last_token_s"] - s["first_token_s"] for s in spans) / 127

    before = step_s()
    os.kill(redis.pid, signal.SIGSTOP)
    try:
        during = step_s()
    finally:
        os.kill(redis.pid, signal.SIGCONT)
    after = step_s()
    assert during < 3 * max(before, after)
