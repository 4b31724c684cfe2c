"""Damages what UCX says on connecting: a real client's message with flipped bits, and noise, to a kv_transfer's port.

    tandem up --detach --prefill 1 --decode 1        (one request first, so that this host is admitted)
    python -m loadtest.fuzz_ucx [--run-dir DIR] [--seconds 120]

UCX asserts where it should refuse, so the kv_transfer may die; its worker must not, and a successor must serve soon.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loadtest.fuzz import Usage, status
from protos import kv_transfer_pb2 as pb
from protos import kv_transfer_pb2_grpc as rpc
from shared.rpc import open_channel
from shared.transfer.transport import TransportError

CLIENT_TIMEOUT_S = 20.0
_REPLY_S = 0.02
_CONNECT_S = 1.0


async def connect_message(port: int) -> bytes:
    """What a client of UCX sends first, recorded on its way to `port`."""
    recorded: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        message = await reader.read(1 << 16)
        if not recorded.done():
            recorded.set_result(message)
        writer.transport.abort()

    async with await asyncio.start_server(forward, "127.0.0.1", 0) as server:
        own_port = server.sockets[0].getsockname()[1]
        client = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "loadtest.fuzz_ucx", "--connect", str(own_port)),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(CLIENT_TIMEOUT_S):
                return await recorded
        finally:
            with contextlib.suppress(ProcessLookupError):
                client.kill()
            await client.wait()


async def connect_once(port: int) -> None:
    """What the recorded child process does."""
    from shared.transfer.ucx import UcxTransport

    transport = UcxTransport("tcp", "127.0.0.1", 0, on_failure=lambda error: sys.exit(1))
    await transport.start(lambda endpoint: None)
    with contextlib.suppress(TransportError):
        endpoint = await transport.connect("127.0.0.1", port)
        await endpoint.send(b"x")
    await asyncio.sleep(CLIENT_TIMEOUT_S)


def damaged(rng: random.Random, message: bytes) -> bytes:
    """Noise, HTTP, zeros, or the connect message with some bits flipped, cut short or drawn out."""
    if rng.random() < 0.3:
        size = rng.choice((0, 1, 8, 16, 64, 500, 60_000))
        return rng.choice((rng.randbytes(size), bytes(size), b"\xff" * size, b"GET / HTTP/1.1\r\n\r\n"))
    raw = bytearray(message)
    for _ in range(rng.randint(1, 6)):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    if rng.random() < 0.2:
        del raw[rng.randrange(len(raw)) :]
    return bytes(raw)


async def fuzz_ucx(port: int, *, seed: int, seconds: float) -> int:
    """Fuzzes one UCX port until the time is over or nobody listens any more; gives the number of connections."""
    rng, message = random.Random(seed), await connect_message(port)
    deadline_s, count = time.monotonic() + seconds, 0
    while time.monotonic() < deadline_s:
        try:
            async with asyncio.timeout(_CONNECT_S):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except (OSError, TimeoutError):
            break
        count += 1
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_REPLY_S):
                writer.write(damaged(rng, message))
                await reader.read(1 << 16)
        writer.transport.abort()
    return count


async def be_admitted(transfer: Mapping[str, Any], fingerprint: str) -> None:
    """Asks a kv_transfer for a block that it doesn't have: it lets this host connect to its UCX from then on."""
    request = pb.FetchRequest(
        fingerprint=fingerprint, incarnation=transfer["incarnation"], block_hashes=bytes(16), requester="fuzz"
    )
    async with open_channel(transfer["address"]) as channel:
        call = rpc.KvFetchStub(channel).Fetch(request)
        await call.read()
        call.cancel()


def ucx_port(log: Path) -> int:
    """Of the life of a kv_transfer that began last, by its log."""
    return int(re.findall(r"ucx_port=(\d+)", log.read_text(errors="replace"))[-1])


async def main(run_dir: str, seconds: float, seed: int) -> None:
    """Fuzzes the sidecar of the first worker, life after life, and prints what became of both."""
    before = {process["name"]: process for process in status(run_dir)["processes"]}
    name = next(name for name in sorted(before) if name.endswith(".transfer"))
    worker = name.removesuffix(".transfer")
    was = Usage.of(before[worker]["pid"])
    deadline_s, count = time.monotonic() + seconds, 0
    while time.monotonic() < deadline_s:
        seed += 1
        found = next(w for w in status(run_dir)["workers"] if w["worker_id"] == before[name]["worker_id"])
        if not found["transfer"]:
            continue  # its next life has not begun yet
        await be_admitted(found["transfer"], found["fingerprint"])
        count += await fuzz_ucx(ucx_port(Path(before[name]["log"])), seed=seed, seconds=deadline_s - time.monotonic())
    await asyncio.sleep(5)
    after = {process["name"]: process for process in status(run_dir)["processes"]}
    sidecar, now = after[name], Usage.of(after[worker]["pid"])
    usage = Usage.of(sidecar["pid"])
    print(f"{count} damaged connections; {name} restarted {sidecar['restarts']} times")
    print(f"{name}: {usage.rss_bytes >> 20} MiB, {usage.descriptors} fds")
    fate = "the same process" if now.pid == was.pid else "RESTARTED"
    print(f"{worker}: {fate}, {was.descriptors} -> {now.descriptors} fds")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", default="")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--connect", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.connect:
        asyncio.run(connect_once(arguments.connect))
    else:
        asyncio.run(main(arguments.run_dir, arguments.seconds, arguments.seed))
