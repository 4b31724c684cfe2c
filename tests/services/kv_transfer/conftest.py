"""Real kv_transfer processes, each beside a stand-in for its worker: an arena, a BlockHost, and the stubs."""

import asyncio
import collections
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from protos import kv_transfer_pb2 as pb
from protos import kv_transfer_pb2_grpc as rpc
from shared.directory.client import Directory
from shared.identity import BlockHash, join_hashes, new_incarnation, split_hashes
from shared.kv_arena import SharedArena
from shared.rpc import bind_unix, new_server, open_channel, unix_target
from shared.seal_table import SealTable, table_path
from shared.worker.pull_stream import PullStream

BLOCK_BYTES = 96 << 10


class StandInHost(rpc.BlockHostServicer):
    """The worker's side of a pin."""

    def __init__(self):
        self.sealed = {}
        self.pinned = collections.Counter()
        self.on_pin = lambda count: None

    async def Pin(self, request, context):
        hashes = split_hashes(request.block_hashes)
        self.on_pin(len(hashes))
        held = [h for h in hashes if h in self.sealed]  # a test may forget one while it is pinned
        self.pinned.update(held)
        try:
            yield pb.PinReply(block_ids=[self.sealed.get(h, -1) for h in hashes])
            await asyncio.Event().wait()
        finally:
            self.pinned.subtract(held)

    @property
    def num_pins(self):
        return sum(self.pinned.values())


class Node:
    """A kv_transfer process and a stand-in for its worker.

    Attributes:
        blocks: The arena, uint8 `[num_blocks, block_bytes]`.
    """

    def __init__(self, worker_id, directory: Path, redis_url, num_blocks, block_bytes, settings):
        self.worker_id = worker_id
        self.directory = directory
        self.socket = directory / f"{worker_id}.sock"
        self.num_blocks, self.block_bytes = num_blocks, block_bytes
        self.fingerprint = settings.pop("fingerprint", "model-a")
        has_table = settings.pop("seal_table", False)
        self.environment = {
            **os.environ,
            "TANDEM_TRANSFER_WORKER_ID": worker_id,
            "TANDEM_TRANSFER_SOCKET": str(self.socket),
            "TANDEM_TRANSFER_REDIS_URL": redis_url,
            "TANDEM_TRANSFER_METRICS_PORT": "-1",
            "TANDEM_TRANSFER_HEARTBEAT_S": "0.2",
            "TANDEM_TRANSFER_TIER_BYTES": str(64 << 20),
            **{f"TANDEM_TRANSFER_{name.upper()}": str(value) for name, value in settings.items()},
        }
        name = f"tandem-test-{os.getpid()}-{directory.name}-{worker_id}"
        self.arena = SharedArena.create(Path("/dev/shm") / name, num_blocks, block_bytes)
        self.blocks = self.arena.blocks
        self.table = None
        if has_table:
            self.table = SealTable.create(table_path(self.arena.path), num_blocks, block_bytes, self.fingerprint)
        self.host = StandInHost()
        self.process = None
        self.attached = None
        self.pulls = None

    def start_process(self):
        self.log = (self.directory / f"{self.worker_id}.log").open("ab")
        command = [sys.executable, "-m", "services.kv_transfer"]
        self.process = subprocess.Popen(command, env=self.environment, stdout=self.log, stderr=self.log)

    async def start_worker(self):
        self.host_server = new_server()
        rpc.add_BlockHostServicer_to_server(self.host, self.host_server)
        bind_unix(self.host_server, self.directory / f"{self.worker_id}.host.sock")
        await self.host_server.start()
        self.channel = open_channel(unix_target(self.socket))
        self.stub = rpc.KvTransferStub(self.channel)

    async def attach(self):
        """Opens the Attach call and waits for its answer."""
        self.call = self.stub.Attach(
            pb.AttachRequest(
                worker_id=self.worker_id,
                incarnation=new_incarnation(),
                fingerprint=self.fingerprint,
                arena_path=str(self.arena.path),
                num_blocks=self.num_blocks,
                block_bytes=self.block_bytes,
                host_socket=str(self.directory / f"{self.worker_id}.host.sock"),
                role="decode",
                seal_table="" if self.table is None else str(self.table.path),
            ),
            wait_for_ready=True,
        )
        self.attached = await asyncio.wait_for(self.call.read(), 30)
        if self.pulls is not None:
            self.pulls.close()
        self.pulls = PullStream(self.stub)
        async with open_channel(self.attached.fetch_address) as channel:
            self.status = await rpc.KvFetchStub(channel).TransferStatus(pb.TransferStatusRequest())

    async def attach_again_if_cut_off(self):
        """As a worker does: a sidecar that was silent for longer than the keepalive has lost the Attach call."""
        if self.call.done():
            await self.attach()

    async def transfer_status(self):
        async with open_channel(self.attached.fetch_address) as channel:
            return await rpc.KvFetchStub(channel).TransferStatus(pb.TransferStatusRequest())

    def seal(self, hashes, first_block=0, seed=0):
        """Fills blocks with random bytes and calls them sealed."""
        rng = np.random.default_rng(seed)
        for block_id, block_hash in enumerate(hashes, first_block):
            self.blocks[block_id] = rng.integers(0, 256, self.block_bytes, dtype=np.uint8)
            self.host.sealed[block_hash] = block_id
        return {h: self.blocks[i].copy() for i, h in enumerate(hashes, first_block)}

    async def pull(self, holder, hashes, block_ids, timeout_s=20.0, session_id="test"):
        return await self.pulls.pull(self.pull_request(holder, hashes, block_ids, timeout_s, session_id))

    def pull_request(self, holder, hashes, block_ids, timeout_s=20.0, session_id="test"):
        return pb.PullRequest(
            session_id=session_id,
            holder_id="" if holder is None else holder.worker_id,
            holder_incarnation="" if holder is None else holder.attached.transfer_incarnation,
            block_hashes=join_hashes(hashes),
            block_ids=block_ids,
            timeout_s=timeout_s,
        )

    async def save(self, hashes):
        ids = [self.host.sealed[h] for h in hashes]
        return list((await self.stub.Save(pb.SaveRequest(block_hashes=join_hashes(hashes), block_ids=ids))).saved)

    async def wait_until_known(self, peer):
        """Until this node's directory snapshot has `peer` as it is now: shown by an empty pull that is not refused."""
        async with asyncio.timeout(30):
            while (await self.pull(peer, [unknown_hash()], [0])).error:
                await asyncio.sleep(0.05)

    async def close(self):
        if self.attached is not None:
            self.call.cancel()
            self.pulls.close()
        await self.channel.close()
        await self.host_server.stop(0)
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                await asyncio.to_thread(self.process.wait, 15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.close()
        self.arena.unlink()
        if self.table is not None:
            self.table.unlink()

    def log_text(self):
        return (self.directory / f"{self.worker_id}.log").read_text()


def some_hashes(count, seed=1):
    raw = np.random.default_rng(seed).bytes(16 * count)
    return [BlockHash(raw[i * 16 : i * 16 + 16]) for i in range(count)]


def unknown_hash():
    return BlockHash(os.urandom(16))


@pytest.fixture
def make_hashes():
    return some_hashes


class Cluster:
    """Starts nodes, `await cluster("a", ...)`, and takes them down together."""

    def __init__(self, directory, redis_url):
        # Socket paths are limited to 107 bytes; pytest's per-test directories are longer.
        self._directory, self._redis_url = directory, redis_url
        self._nodes = []

    async def __call__(
        self, worker_id, *, num_blocks=64, block_bytes=BLOCK_BYTES, attach=True, redis_url="", **settings
    ):
        node = Node(worker_id, self._directory, redis_url or self._redis_url, num_blocks, block_bytes, settings)
        self._nodes.append(node)
        node.start_process()
        await node.start_worker()
        if attach:
            await node.attach()
        return node

    async def pair(self, **options):
        """Two nodes, the second of which knows the first."""
        holder, puller = await asyncio.gather(self("holder", **options), self("puller", **options))
        await puller.wait_until_known(holder)
        return holder, puller

    async def close(self):
        await asyncio.gather(*(node.close() for node in self._nodes))


@pytest.fixture
async def cluster(tmp_path_factory, fresh_redis_url):
    cluster = Cluster(tmp_path_factory.mktemp("kvt"), fresh_redis_url)
    yield cluster
    await cluster.close()


@pytest.fixture
async def pair(cluster):
    """Two nodes of the test's own, to be broken."""
    return await cluster.pair()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lasting_pair(tmp_path_factory, redis_url):
    """Two nodes for a whole module, for tests that leave them as they were."""
    cluster = Cluster(tmp_path_factory.mktemp("kvt"), redis_url)
    yield await cluster.pair()
    await cluster.close()


@pytest.fixture
def open_directory(fresh_redis_url):
    return lambda: Directory(fresh_redis_url, heartbeat_s=0.2)
