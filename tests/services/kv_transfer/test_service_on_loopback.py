"""Two whole services in this process over the loopback transport, where damage can be done on purpose."""

import asyncio
import contextlib

import grpc
import numpy as np
import pytest

from protos import kv_transfer_pb2 as pb
from protos import kv_transfer_pb2_grpc as rpc
from services.kv_transfer.service import TransferService
from services.kv_transfer.settings import TransferSettings
from shared.errors import InvalidRequest
from shared.identity import join_hashes, split_hashes
from shared.kv_arena import SharedArena
from shared.rpc import bind_unix, new_server, open_channel, unix_target
from shared.transfer.loopback import LoopbackNetwork, LoopbackTransport
from shared.worker.pull_stream import PullStream

pytestmark = pytest.mark.timeout(60)

NUM_BLOCKS, BLOCK_BYTES = 16, 130_000


class Host(rpc.BlockHostServicer):
    def __init__(self):
        self.sealed = {}

    async def Pin(self, request, context):
        yield pb.PinReply(block_ids=[self.sealed.get(h, -1) for h in split_hashes(request.block_hashes)])
        await asyncio.Event().wait()


class Side:
    """One service, its stand-in worker, and the stub to it."""

    def __init__(self, name, service, arena, host, stub):
        self.name, self.service, self.arena, self.host, self.stub = name, service, arena, host, stub
        self.pulls = PullStream(stub)

    def seal(self, hashes):
        rng = np.random.default_rng(0)
        self.arena.blocks[: len(hashes)] = rng.integers(0, 256, (len(hashes), BLOCK_BYTES), dtype=np.uint8)
        self.host.sealed = {block_hash: i for i, block_hash in enumerate(hashes)}

    def pull(self, holder_id, hashes, block_ids, timeout_s=10.0):
        return self.pulls.pull(
            pb.PullRequest(
                holder_id=holder_id, block_hashes=join_hashes(hashes), block_ids=block_ids, timeout_s=timeout_s
            )
        )


@contextlib.asynccontextmanager
async def side(name, directory, redis_url, network):
    async with contextlib.AsyncExitStack() as stack:
        socket, host_socket = directory / f"{name}.sock", directory / f"{name}.host"
        settings = TransferSettings(
            worker_id=name, socket=socket, redis_url=redis_url, tier_bytes=8 << 20, metrics_port=-1, heartbeat_s=0.1
        )
        transport = LoopbackTransport(network)
        stack.push_async_callback(transport.stop)
        service = TransferService(settings, transport)
        await stack.enter_async_context(service.running())
        arena = SharedArena.create(directory / f"{name}.arena", NUM_BLOCKS, BLOCK_BYTES)
        host, host_server = Host(), new_server()
        rpc.add_BlockHostServicer_to_server(host, host_server)
        bind_unix(host_server, host_socket)
        await host_server.start()
        stack.push_async_callback(host_server.stop, 0)
        stub = rpc.KvTransferStub(await stack.enter_async_context(open_channel(unix_target(socket))))
        call = stub.Attach(
            pb.AttachRequest(
                worker_id=name,
                fingerprint="model",
                arena_path=str(arena.path),
                num_blocks=NUM_BLOCKS,
                block_bytes=BLOCK_BYTES,
                host_socket=str(host_socket),
            )
        )
        assert await call.read()
        stack.callback(call.cancel)
        one = Side(name, service, arena, host, stub)
        stack.callback(one.pulls.close)
        yield one


@pytest.fixture
def network():
    return LoopbackNetwork()


@pytest.fixture
async def sides(tmp_path_factory, fresh_redis_url, network, make_hashes):
    directory = tmp_path_factory.mktemp("lo")
    async with (
        side("holder", directory, fresh_redis_url, network) as holder,
        side("puller", directory, fresh_redis_url, network) as puller,
    ):
        async with asyncio.timeout(30):
            while (await puller.pull("holder", make_hashes(1, seed=99), [0])).error:
                await asyncio.sleep(0.02)
        yield holder, puller


def corrupt_in_tier(service, block_hash):
    (entry,) = service._tiers.memory.pin([block_hash])
    entry.block[1000] ^= 1
    service._tiers.memory.unpin([entry])


async def saved_and_evicted(holder, hashes):
    holder.seal(hashes)
    request = pb.SaveRequest(block_hashes=join_hashes(hashes), block_ids=range(len(hashes)))
    assert all((await holder.stub.Save(request)).saved)
    holder.host.sealed = {}


async def test_a_block_damaged_in_the_tier_is_not_delivered_to_the_own_worker(sides, make_hashes):
    holder, _ = sides
    hashes = make_hashes(4)
    await saved_and_evicted(holder, hashes)
    corrupt_in_tier(holder.service, hashes[2])
    reply = await holder.pull("", hashes, [8, 9, 10, 11])
    assert (list(reply.verified), reply.mismatched, reply.missing) == ([True, True, False, True], 1, 0)
    reply = await holder.pull("", hashes, [8, 9, 10, 11])  # dropped: next time it is missing
    assert (list(reply.verified), reply.mismatched, reply.missing) == ([True, True, False, True], 0, 1)


async def test_a_block_damaged_in_the_tier_is_not_believed_by_a_peer(sides, make_hashes):
    holder, puller = sides
    hashes = make_hashes(4)
    await saved_and_evicted(holder, hashes)
    corrupt_in_tier(holder.service, hashes[0])
    reply = await puller.pull("holder", hashes, [0, 1, 2, 3])
    assert (list(reply.verified), reply.mismatched, reply.missing) == ([False, True, True, True], 1, 0)
    assert puller.service.status().mismatched_blocks == 1
    async with asyncio.timeout(30):
        while holder.service.status().tier_blocks != 3:  # the holder noticed, too
            await asyncio.sleep(0.01)
    reply = await puller.pull("holder", hashes, [0, 1, 2, 3])
    assert (reply.mismatched, reply.missing) == (0, 1)


async def test_a_byte_that_changes_between_checksum_and_send_is_noticed(sides, make_hashes, network):
    holder, puller = sides
    hashes = make_hashes(3)
    holder.seal(hashes)
    network.is_stalled = True  # checksums are taken at once, the bytes leave later
    pulling = asyncio.ensure_future(puller.pull("holder", hashes, [0, 1, 2]))
    await asyncio.sleep(0.5)
    holder.arena.blocks[1, -1] ^= 1
    network.is_stalled = False
    reply = await pulling
    assert (list(reply.verified), reply.mismatched, reply.error) == ([True, False, True], 1, "")


async def test_a_wire_that_damages_everything_delivers_nothing(sides, make_hashes, network):
    holder, puller = sides
    hashes = make_hashes(3)
    holder.seal(hashes)

    def flip(block):
        block[-1] ^= 128

    network.damage = flip
    reply = await puller.pull("holder", hashes, [0, 1, 2])
    assert (list(reply.verified), reply.mismatched, reply.error) == ([False] * 3, 3, "")


async def test_a_slot_has_one_pull_at_a_time(sides, make_hashes, network):
    holder, puller = sides
    hashes = make_hashes(3)
    holder.seal(hashes)
    network.is_stalled = True
    first = asyncio.ensure_future(puller.pull("holder", hashes[:2], [4, 5], timeout_s=0.5))
    await asyncio.sleep(0.2)
    with pytest.raises(InvalidRequest):
        await puller.pull("holder", hashes[2:], [5])
    assert "request_timeout" in (await first).error
    network.is_stalled = False
    assert all((await puller.pull("holder", hashes[2:], [5])).verified)  # the slot is free again


async def test_a_peer_that_never_claims_its_grant_loses_it(sides, make_hashes, monkeypatch):
    holder, _ = sides
    monkeypatch.setattr("services.kv_transfer.fetch.GRANT_S", 0.2)
    hashes = make_hashes(2)
    holder.seal(hashes)
    async with open_channel(holder.service.fetch_address) as channel:
        call = rpc.KvFetchStub(channel).Fetch(
            pb.FetchRequest(
                fingerprint="model", incarnation=holder.service.incarnation, block_hashes=join_hashes(hashes)
            )
        )
        assert list((await call.read()).available) == [0, 1]
        with pytest.raises(grpc.aio.AioRpcError, match="not claimed"):
            await asyncio.wait_for(call.read(), 30)
    assert len(holder.service._grants) == 0
    assert holder.service.status().active_transfers == 0


async def test_a_worker_that_dies_before_its_attach_is_answered_is_not_attached(
    tmp_path_factory, fresh_redis_url, network
):
    """Its next life would be told that the last one is still there."""
    directory = tmp_path_factory.mktemp("lo")
    async with side("holder", directory, fresh_redis_url, network) as holder:
        service, opening, opened = holder.service, asyncio.Event(), asyncio.Event()

        async def adopt(fingerprint, block_bytes):
            opening.set()
            await opened.wait()

        service._tiers.adopt = adopt
        request = pb.AttachRequest(
            worker_id="holder",
            fingerprint="model",
            arena_path=str(holder.arena.path),
            num_blocks=NUM_BLOCKS,
            block_bytes=BLOCK_BYTES,
            host_socket=str(directory / "holder.host"),
        )
        call = holder.stub.Attach(request)
        async with asyncio.timeout(10):
            await opening.wait()
            call.cancel()
            while service.status().attached:
                await asyncio.sleep(0.01)
