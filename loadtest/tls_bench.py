"""What mutual TLS costs: a connection, and a message per engine step, against plaintext, side by side.

    python -m loadtest.tls_bench [--rounds 200]

The server is a process of its own; a message is what a step of 32 sequences sends.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
import uvloop

from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from services.cli.certificates import fleet_members, issue_certificates
from shared.rpc import PeerRole, TlsFiles, bind_tcp, new_server, open_channel

STEP = pb.StepOutput(sequences=range(32), token_ids=range(2000, 2032))


class Echo(rpc.WorkerServicer):
    """Answers each command with a step."""

    async def Status(  # noqa: N802
        self, request: pb.StatusRequest, context: grpc.aio.ServicerContext[pb.StatusRequest, pb.StatusReply]
    ) -> pb.StatusReply:
        """Answers."""
        return pb.StatusReply()

    async def Generate(  # noqa: N802
        self,
        request_iterator: AsyncIterator[pb.GenerateCommand],
        context: grpc.aio.ServicerContext[pb.GenerateCommand, pb.StepOutput],
    ) -> AsyncIterator[pb.StepOutput]:
        """A step for each command."""
        async for _ in request_iterator:
            yield STEP


def serve(directory: str, addresses: Connection) -> None:
    """Serves plaintext and TLS on a port each until killed."""

    async def run() -> None:
        tls = TlsFiles(Path(directory) / "decode.d0")
        bound, servers = [], []
        for identity in (None, tls):
            server = new_server(checks_callers=identity is not None)
            rpc.add_WorkerServicer_to_server(Echo(), server)
            bound.append(bind_tcp(server, "127.0.0.1", 0, tls=identity))
            await server.start()
            servers.append(server)
        addresses.send(bound)
        await servers[0].wait_for_termination()

    uvloop.run(run())


async def connect_s(address: str, tls: TlsFiles | None) -> float:
    """A new connection up to the first answer."""
    started = time.perf_counter()
    async with open_channel(address, tls=tls, peer=(PeerRole.DECODE, "d0")) as channel:
        await rpc.WorkerStub(channel).Status(pb.StatusRequest())
    return time.perf_counter() - started


async def main(addresses: list[str], tls: TlsFiles, rounds: int) -> None:
    """Measures interleaved and prints medians."""
    kinds = {"plaintext": (addresses[0], None), "mutual TLS": (addresses[1], tls)}
    connects: dict[str, list[float]] = {kind: [] for kind in kinds}
    steps: dict[str, list[float]] = {kind: [] for kind in kinds}
    async with contextlib.AsyncExitStack() as stack:
        calls = {}
        for kind, (address, identity) in kinds.items():
            channel = await stack.enter_async_context(open_channel(address, tls=identity, peer=(PeerRole.DECODE, "d0")))
            calls[kind] = rpc.WorkerStub(channel).Generate()
        for _ in range(rounds):
            for kind, (address, identity) in kinds.items():
                connects[kind].append(await connect_s(address, identity))
                for _ in range(20):
                    started = time.perf_counter()
                    await calls[kind].write(pb.GenerateCommand())
                    await calls[kind].read()
                    steps[kind].append(time.perf_counter() - started)
        for call in calls.values():
            call.cancel()
    for kind in kinds:
        print(
            f"{kind:12} connect and first answer {1e3 * statistics.median(connects[kind]):6.2f} ms, "
            f"round trip of a step's message {1e6 * statistics.median(steps[kind]):6.0f} us"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory_name:
        issue_certificates(Path(directory_name), fleet_members([], ["d0"]))
        receiving, sending = multiprocessing.Pipe(duplex=False)
        server = multiprocessing.get_context("spawn").Process(target=serve, args=(directory_name, sending), daemon=True)
        server.start()
        uvloop.run(main(receiving.recv(), TlsFiles(Path(directory_name) / "gateway"), arguments.rounds))
        server.terminate()
