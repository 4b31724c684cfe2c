"""Channels, servers and the error mapping, over real sockets."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import grpc
import pytest

from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from shared.errors import (
    CapacityExceeded,
    ConfigurationError,
    InternalError,
    Overloaded,
    RequestTimeout,
    StaleIncarnation,
    UnsupportedField,
    WorkerLost,
)
from shared.rpc import bind_tcp, bind_unix, error_from_rpc, new_server, open_channel, rpc_errors, unix_target

pytestmark = pytest.mark.timeout(60)


class FakeWorker(rpc.WorkerServicer):
    """Replies or raises as the test says."""

    def __init__(self, outcome=None):
        self.outcome = outcome
        self.open_calls = 0
        self.ended = asyncio.Event()

    async def Status(self, request, context):
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        if self.outcome == "sleep":
            await asyncio.sleep(30)
        return pb.StatusReply(worker_id="w0", reason=self.outcome or "")

    async def Prefill(self, request, context):
        self.open_calls += 1
        try:
            yield pb.PrefillProgress(sealed_blocks=1)
            if isinstance(self.outcome, BaseException):
                raise self.outcome
            if self.outcome == "flood":
                while True:
                    yield pb.PrefillProgress(sealed_blocks=2)
            await asyncio.sleep(30)
        finally:
            self.open_calls -= 1
            self.ended.set()

    async def Generate(self, request_iterator, context):
        async for command in request_iterator:
            await context.write(pb.StepOutput(token_ids=command.submit.prompt_tokens))
        if isinstance(self.outcome, BaseException):
            raise self.outcome


@pytest.fixture
async def worker():
    servicer = FakeWorker()
    server = new_server()
    rpc.add_WorkerServicer_to_server(servicer, server)
    address = bind_tcp(server, "127.0.0.1", 0)
    await server.start()
    async with open_channel(address) as channel:
        yield servicer, rpc.WorkerStub(channel)
    await server.stop(0)


@pytest.mark.parametrize(
    "error",
    [
        CapacityExceeded("needs 90 blocks, the worker has 64"),
        StaleIncarnation("meant abc, this is def"),
        Overloaded("queue of 256 is full"),
        UnsupportedField("no such thing", param="logit_bias"),
    ],
    ids=lambda e: e.code,
)
async def test_an_error_of_ours_crosses_the_wire_as_itself(worker, error):
    servicer, stub = worker
    servicer.outcome = error
    with pytest.raises(type(error)) as caught, rpc_errors():
        await stub.Status(pb.StatusRequest())
    assert (caught.value.message, caught.value.param) == (error.message, error.param)
    assert isinstance(caught.value.__cause__, grpc.aio.AioRpcError)


async def test_status_code_and_trailing_metadata_carry_the_error_for_foreign_clients(worker):
    servicer, stub = worker
    servicer.outcome = Overloaded("full")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Status(pb.StatusRequest())
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(tuple(caught.value.trailing_metadata()))["tandem-code"] == "overloaded"


async def test_an_error_after_some_replies_of_a_stream_crosses_too(worker):
    servicer, stub = worker
    servicer.outcome = StaleIncarnation("restarted")
    call = stub.Prefill(pb.PrefillRequest())
    assert (await call.read()).sealed_blocks == 1
    with pytest.raises(StaleIncarnation), rpc_errors():
        await call.read()


async def test_a_servicer_that_writes_through_its_context_is_guarded_too(worker):
    servicer, stub = worker
    servicer.outcome = Overloaded("full")
    call = stub.Generate(iter([pb.GenerateCommand(submit=pb.Submit(prompt_tokens=b"\x07"))]))
    assert (await call.read()).token_ids == [7]
    with pytest.raises(Overloaded), rpc_errors():
        await call.read()


async def test_a_defect_in_a_servicer_is_an_internal_error_without_its_details(worker):
    servicer, stub = worker
    servicer.outcome = KeyError("secret")
    with pytest.raises(InternalError, match="Status") as caught, rpc_errors():
        await stub.Status(pb.StatusRequest())
    assert "secret" not in caught.value.message


async def test_a_passed_deadline_is_a_request_timeout(worker):
    servicer, stub = worker
    servicer.outcome = "sleep"
    with pytest.raises(RequestTimeout), rpc_errors():
        await stub.Status(pb.StatusRequest(), timeout=0.1)


async def test_a_long_message_with_newlines_and_unicode_survives_up_to_its_bound(worker):
    servicer, stub = worker
    servicer.outcome = Overloaded("größer\n" * 1000)
    with pytest.raises(Overloaded) as caught, rpc_errors():
        await stub.Status(pb.StatusRequest())
    assert caught.value.message == ("größer\n" * 1000)[:1024]


async def test_nobody_listening_is_worker_lost_at_once(tmp_path):
    started = time.monotonic()
    for target in ("127.0.0.1:1", unix_target(tmp_path / "none.sock")):
        async with open_channel(target) as channel:
            with pytest.raises(WorkerLost), rpc_errors():
                await rpc.WorkerStub(channel).Status(pb.StatusRequest())
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("outcome", [None, "flood"], ids=["while_it_waits", "while_it_sends"])
async def test_cancelling_a_call_runs_the_servicers_cleanup_promptly(worker, outcome):
    servicer, stub = worker
    servicer.outcome = outcome
    call = stub.Prefill(pb.PrefillRequest())
    await call.read()
    assert servicer.open_calls == 1
    call.cancel()
    await asyncio.wait_for(servicer.ended.wait(), 0.5)
    assert servicer.open_calls == 0


async def test_closing_the_channel_ends_its_open_calls(tmp_path):
    servicer = FakeWorker()
    server = new_server()
    rpc.add_WorkerServicer_to_server(servicer, server)
    target = bind_unix(server, tmp_path / "w.sock")
    await server.start()
    channel = open_channel(target)
    await rpc.WorkerStub(channel).Prefill(pb.PrefillRequest()).read()
    await channel.close()
    await asyncio.wait_for(servicer.ended.wait(), 0.5)
    await server.stop(0)


async def test_a_unix_socket_left_by_a_dead_process_is_replaced(tmp_path):
    path = tmp_path / "w.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    server = new_server()
    rpc.add_WorkerServicer_to_server(FakeWorker(), server)
    target = bind_unix(server, path)
    await server.start()
    async with open_channel(target) as channel:
        assert (await rpc.WorkerStub(channel).Status(pb.StatusRequest())).worker_id == "w0"
    await server.stop(0)


async def test_a_message_of_32_mib_passes_and_one_over_the_bound_is_refused(worker):
    servicer, stub = worker
    servicer.outcome = "x" * (32 << 20)
    assert len((await stub.Status(pb.StatusRequest())).reason) == 32 << 20
    servicer.outcome = "x" * ((64 << 20) + 1)
    with pytest.raises(InternalError, match="larger than max"), rpc_errors():
        await stub.Status(pb.StatusRequest())


async def test_a_taken_port_and_an_overlong_socket_path_are_configuration_errors(tmp_path):
    first, second = new_server(), new_server()
    address = bind_tcp(first, "127.0.0.1", 0)
    with pytest.raises(ConfigurationError, match="port taken"):
        bind_tcp(second, "127.0.0.1", int(address.rpartition(":")[2]))
    with pytest.raises(ConfigurationError, match="exceeds 107"):
        bind_unix(second, tmp_path / ("x" * 120))
    with pytest.raises(ConfigurationError, match="cannot listen"):
        bind_unix(second, "/nonexistent/w.sock")


def test_a_status_without_a_code_of_ours_is_a_defect():
    error = grpc.aio.AioRpcError(grpc.StatusCode.UNIMPLEMENTED, (), (), "Method not found!")
    assert repr(error_from_rpc(error)) == repr(InternalError("UNIMPLEMENTED: Method not found!"))


def test_a_call_that_ends_under_a_write_is_lost():
    error = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, (), (), "Internal error from Core", 'Failed "execute_batch"')
    assert isinstance(error_from_rpc(error), WorkerLost)
    defect = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, (), (), "a servicer's")
    assert isinstance(error_from_rpc(defect), InternalError)


PEER = textwrap.dedent("""
    import asyncio, sys, time
    from protos import worker_pb2 as pb, worker_pb2_grpc as rpc
    from shared.rpc import bind_tcp, bind_unix, new_server

    class Peer(rpc.WorkerServicer):
        async def Prefill(self, request, context):
            yield pb.PrefillProgress(sealed_blocks=1)
            time.sleep(int(request.session_id or 0))  # holds the loop up, on purpose
            yield pb.PrefillProgress(sealed_blocks=2)
            await asyncio.sleep(60)

    async def main():
        server = new_server()
        rpc.add_WorkerServicer_to_server(Peer(), server)
        where = sys.argv[1]
        print(bind_unix(server, where) if "/" in where else bind_tcp(server, "127.0.0.1", int(where)), flush=True)
        await server.start()
        await server.wait_for_termination()

    asyncio.run(main())
""")


def start_peer(where):
    process = subprocess.Popen([sys.executable, "-c", PEER, str(where)], stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize("stop", [signal.SIGSTOP, signal.SIGKILL], ids=["stopped", "killed"])
async def test_a_silent_or_dead_peer_ends_an_idle_call_within_the_keepalive_time(tmp_path, kind, stop):
    process, target = start_peer(tmp_path / "p.sock" if kind == "unix" else 0)
    try:
        async with open_channel(target) as channel:
            call = rpc.WorkerStub(channel).Prefill(pb.PrefillRequest())
            await call.read()
            await call.read()
            os.kill(process.pid, stop)
            started = time.monotonic()
            with pytest.raises(WorkerLost), rpc_errors():
                await asyncio.wait_for(call.read(), 30)
            assert time.monotonic() - started < (6 if stop == signal.SIGSTOP else 1)
    finally:
        process.kill()
        process.wait()


async def test_a_busy_peer_is_not_taken_for_a_dead_one(tmp_path):
    process, target = start_peer(0)
    try:
        async with open_channel(target) as channel:
            call = rpc.WorkerStub(channel).Prefill(pb.PrefillRequest(session_id="9"))
            assert (await call.read()).sealed_blocks == 1
            assert (await call.read()).sealed_blocks == 2
    finally:
        process.kill()
        process.wait()


CALLER = textwrap.dedent("""
    import asyncio, sys
    from protos import worker_pb2 as pb, worker_pb2_grpc as rpc
    from shared.rpc import open_channel

    async def main():
        async with open_channel(sys.argv[1]) as channel:
            call = rpc.WorkerStub(channel).Prefill(pb.PrefillRequest())
            await call.read()
            await call.read()

    asyncio.run(main())
""")


def start_caller(target):
    return subprocess.Popen([sys.executable, "-c", CALLER, target])


@pytest.mark.parametrize("stop", [signal.SIGSTOP, signal.SIGKILL], ids=["stopped", "killed"])
async def test_a_silent_or_dead_caller_ends_its_call_at_the_server(tmp_path, stop):
    servicer = FakeWorker()
    server = new_server()
    rpc.add_WorkerServicer_to_server(servicer, server)
    target = bind_tcp(server, "127.0.0.1", 0)
    await server.start()
    caller = start_caller(target)
    try:
        while not servicer.open_calls:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.1)
        os.kill(caller.pid, stop)
        await asyncio.wait_for(servicer.ended.wait(), 6 if stop == signal.SIGSTOP else 0.5)
    finally:
        caller.kill()
        caller.wait()
        await server.stop(0)


async def test_a_channel_finds_a_restarted_peer_again_within_two_seconds(tmp_path):
    process, address = start_peer(0)
    restarted = None
    try:
        async with open_channel(address) as channel:
            stub = rpc.WorkerStub(channel)
            await stub.Prefill(pb.PrefillRequest()).read()
            process.kill()
            process.wait()
            with pytest.raises(WorkerLost), rpc_errors():
                await stub.Prefill(pb.PrefillRequest()).read()
            restarted, again = start_peer(address.rpartition(":")[2])
            assert again == address
            progress = await stub.Prefill(pb.PrefillRequest(), wait_for_ready=True, timeout=2).read()
            assert progress.sealed_blocks == 1
    finally:
        for running in (process, restarted):
            if running:
                running.kill()
                running.wait()
