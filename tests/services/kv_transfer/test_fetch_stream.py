"""Many fetches on one stream: each has a life of its own, and none outlives the stream."""

import asyncio

import grpc
import pytest

from protos import kv_transfer_pb2 as pb
from protos import kv_transfer_pb2_grpc as rpc
from services.kv_transfer.fetch_stream import FetchStream
from shared.errors import InternalError, InvalidRequest, Overloaded, StaleIncarnation, Unavailable, WorkerLost
from shared.rpc import bind_tcp, error_from_rpc, new_server, open_channel
from shared.rpc.served_calls import ServedCalls

pytestmark = pytest.mark.timeout(30)

LIMIT = 4


class Holder(rpc.KvFetchServicer):
    """Serves as the session id of each request says."""

    def __init__(self):
        self.open = set()
        self.streams = 0

    async def Fetches(self, request_iterator, context):
        self.streams += 1
        await context.send_initial_metadata(())
        await ServedCalls(self.serve, context.write, pb.FetchAnswer, limit=LIMIT).run(request_iterator)

    async def serve(self, request, reply):
        name = request.session_id
        self.open.add(name)
        try:
            if name == "refuse":
                await reply(pb.FetchReply(refused=StaleIncarnation.code))
                return
            await reply(pb.FetchReply(ucx_host=name))
            if name == "break":
                raise Unavailable("the worker ended the pin")
            if name == "defect":
                raise ZeroDivisionError
            if name.startswith("stay"):
                await asyncio.Event().wait()
        finally:
            self.open.discard(name)


@pytest.fixture
async def holder():
    return Holder()


@pytest.fixture
async def server(holder):
    server = new_server()
    rpc.add_KvFetchServicer_to_server(holder, server)
    server.address = bind_tcp(server, "127.0.0.1", 0)
    await server.start()
    yield server
    await server.stop(None)


@pytest.fixture
async def channel(server):
    async with open_channel(server.address) as channel:
        yield channel


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


async def fetch(stream, name, receive=None):
    async with stream.call(pb.FetchRequest(session_id=name)) as one:
        reply = await one.first_reply()
        return reply.ucx_host if receive is None else await one.while_granted(receive)


async def test_fetches_share_a_stream_and_do_not_wait_for_each_other(channel, holder):
    stream = FetchStream(channel)
    staying = asyncio.ensure_future(fetch(stream, "stay", asyncio.sleep(60)))
    await until(lambda: "stay" in holder.open)
    names = [str(i) for i in range(3)]
    assert await asyncio.gather(*(fetch(stream, name) for name in names)) == names
    assert holder.streams == 1
    assert holder.open == {"stay"}
    staying.cancel()
    await until(lambda: not holder.open)  # giving one up says so to the holder
    assert await fetch(stream, "again") == "again"


async def test_what_ends_one_fetch_leaves_the_others_alone(channel, holder):
    stream = FetchStream(channel)
    staying = asyncio.ensure_future(fetch(stream, "stay", asyncio.sleep(0.5, "all")))
    with pytest.raises(StaleIncarnation):
        await fetch(stream, "refuse")
    with pytest.raises(WorkerLost, match=r"the holder ended the grant: .*the worker ended the pin"):
        await fetch(stream, "break", asyncio.sleep(60))
    with pytest.raises(WorkerLost, match=InternalError.code):
        await fetch(stream, "defect", asyncio.sleep(60))
    assert await staying == "all"
    assert not stream.is_over


async def test_a_lost_grant_is_raised_only_when_receiving_has_ended(channel):
    log = []

    async def receive():
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            log.append("slots are quiet")

    with pytest.raises(WorkerLost):
        await fetch(FetchStream(channel), "break", receive())
    assert log in ([], ["slots are quiet"])  # [] = it was over before anything was posted


async def test_the_end_of_the_stream_ends_every_fetch_at_both_ends(channel, holder):
    stream = FetchStream(channel)
    staying = [asyncio.ensure_future(fetch(stream, f"stay{i}", asyncio.sleep(60))) for i in range(3)]
    await until(lambda: len(holder.open) == 3)
    stream.close()
    for one in staying:
        with pytest.raises(WorkerLost):
            await one
    await until(lambda: not holder.open)
    assert stream.is_over


async def test_a_retired_stream_ends_with_its_last_fetch(channel, holder):
    stream = FetchStream(channel)
    staying = asyncio.ensure_future(fetch(stream, "stay", asyncio.sleep(0.3, "all")))
    await until(lambda: holder.open)
    stream.retire()
    assert await staying == "all"
    await until(lambda: stream.is_over and not holder.open)


async def test_a_holder_that_is_gone_fails_a_fetch_at_once(server, holder, channel):
    stream = FetchStream(channel)
    staying = asyncio.ensure_future(fetch(stream, "stay", asyncio.sleep(60)))
    await until(lambda: holder.open)
    await server.stop(None)
    with pytest.raises(WorkerLost):
        await asyncio.wait_for(staying, 30)
    with pytest.raises(WorkerLost):
        await asyncio.wait_for(fetch(FetchStream(channel), "late"), 30)


async def test_a_peer_that_breaks_the_rules_loses_its_stream_and_its_pins(channel, holder):
    stub = rpc.KvFetchStub(channel)
    for number_of, asks, error in ((lambda i: 1, 2, InvalidRequest), (lambda i: i, 2 * LIMIT + 1, Overloaded)):
        call = stub.Fetches()
        for i in range(asks):
            request = pb.FetchRequest(session_id=f"stay{i}")
            await call.write(pb.FetchAsk(number=number_of(i), request=request))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        assert isinstance(error_from_rpc(caught.value), error)
        await until(lambda: not holder.open)
