"""Who answers nothing any more is told from who has nothing to say."""

import asyncio
import subprocess
import sys
import textwrap
import time

import pytest

from protos import worker_pb2_grpc as rpc
from shared.rpc import open_channel, silence

pytestmark = pytest.mark.timeout(60)

PEER = textwrap.dedent("""
    import asyncio, ctypes, threading, time
    from protos import worker_pb2 as pb, worker_pb2_grpc as rpc
    from shared.rpc import bind_tcp, new_server

    class Peer(rpc.WorkerServicer):
        async def Status(self, request, context):
            return pb.StatusReply()

    def hold_the_gil():
        input()
        ctypes.PyDLL(None).sleep(40)  # a PyDLL does not let it go

    async def main():
        server = new_server()
        rpc.add_WorkerServicer_to_server(Peer(), server)
        print(bind_tcp(server, "127.0.0.1", 0), flush=True)
        await server.start()
        threading.Thread(target=hold_the_gil, daemon=True).start()
        await server.wait_for_termination()

    asyncio.run(main())
""")


def start_peer():
    command = [sys.executable, "-c", PEER]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)


async def test_a_peer_whose_python_stands_still_is_found_out_and_a_quiet_one_is_not(monkeypatch):
    monkeypatch.setattr(silence, "QUIET_S", 0.1)
    monkeypatch.setattr(silence, "ANSWER_WITHIN_S", 3.0)
    process = start_peer()
    try:
        async with open_channel(process.stdout.readline().strip()) as channel:
            began_s = time.monotonic()
            silent = asyncio.create_task(silence.until_unresponsive(rpc.WorkerStub(channel), lambda: began_s))
            await asyncio.sleep(1.5)
            assert not silent.done()
            process.stdin.write("\n")
            assert "has not answered for 3" in await asyncio.wait_for(silent, 20)
            assert channel.get_state().name == "READY"  # pings are answered all the while
    finally:
        process.kill()
        process.wait()
