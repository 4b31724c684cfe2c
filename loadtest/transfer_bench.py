"""Measures the KV-transfer service beside its floor: `python -m loadtest.transfer_bench`.

Two real kv_transfer processes, each beside a stand-in for its worker, pull blocks through the whole path: gRPC on the
Unix socket, Fetch, pins, UCX, checksums. In the same run the same messages go over bare UCX between two processes (the
transport of `shared/transfer` and nothing else) and through memcpy from one shared-memory file to another, so that the
ratios hold however busy the machine is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import numpy as np

from protos import kv_transfer_pb2 as pb
from protos import kv_transfer_pb2_grpc as rpc
from shared.directory.redis_server import RedisServer
from shared.identity import BlockHash, BlockId, join_hashes, new_incarnation, split_hashes
from shared.kv_arena import SharedArena
from shared.rpc import bind_unix, new_server, open_channel, unix_target
from shared.seal_table import SealTable, table_path
from shared.transfer.checksum import block_checksums
from shared.transfer.protocol import new_tag_base
from shared.transfer.transport import Endpoint
from shared.transfer.ucx import UcxTransport

MIB = 1 << 20


class _Host(rpc.BlockHostServicer):
    """Every block of the arena is sealed, under its number."""

    def __init__(self, hashes: list[BlockHash]) -> None:
        self._ids = {block_hash: block_id for block_id, block_hash in enumerate(hashes)}

    async def Pin(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        yield pb.PinReply(block_ids=[self._ids.get(h, -1) for h in split_hashes(request.block_hashes)])
        await asyncio.Event().wait()


class _Node:
    """One kv_transfer process, attached."""

    def __init__(
        self,
        name: str,
        stub: rpc.KvTransferAsyncStub,
        arena: SharedArena,
        table: SealTable,
        incarnation: str,
        pid: int,
    ) -> None:
        self.name = name
        self.stub = stub
        self.arena = arena
        self.table = table
        self.incarnation = incarnation
        self.pid = pid

    async def seal_all(self, hashes: list[BlockHash]) -> None:
        """Names every block in the table, as an engine does, and waits until kv_transfer has its checksum."""
        for block_id, block_hash in enumerate(hashes):
            self.table.record(BlockId(block_id), block_hash)
        publishing = self.stub.Publish()
        await publishing.write(pb.BlockEvents(reset=True, sealed=join_hashes(hashes)))
        while self.table.unchecked():  # noqa: ASYNC110 - another process does it
            await asyncio.sleep(0.01)

    async def pull(self, holder: _Node | None, hashes: list[BlockHash], block_ids: list[int]) -> pb.PullReply:
        reply = await self.stub.Pull(
            pb.PullRequest(
                session_id="bench",
                holder_id=holder.name if holder else "",
                holder_incarnation=holder.incarnation if holder else "",
                block_hashes=join_hashes(hashes),
                block_ids=block_ids,
                timeout_s=60,
            )
        )
        assert isinstance(reply, pb.PullReply)
        return reply


def _spawn(module: str, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", module, *arguments], env=environment, stdout=subprocess.PIPE)


@contextlib.asynccontextmanager
async def _node(
    name: str, directory: Path, redis_url: str, tls: str, hashes: list[BlockHash], block_bytes: int
) -> AsyncIterator[_Node]:
    arena = SharedArena.create(Path(f"/dev/shm/tandem-bench-{os.getpid()}-{name}"), len(hashes), block_bytes)
    table = SealTable.create(table_path(arena.path), len(hashes), block_bytes, "bench")
    socket, host_socket = directory / f"{name}.sock", directory / f"{name}.host.sock"
    settings = {
        "WORKER_ID": name,
        "SOCKET": str(socket),
        "REDIS_URL": redis_url,
        "UCX_TLS": tls,
        "TIER_BYTES": str(len(hashes) * block_bytes),
        "METRICS_PORT": "-1",
        "LOG_LEVEL": "warning",
    }
    environment = {**os.environ, **{f"TANDEM_TRANSFER_{key}": value for key, value in settings.items()}}
    process = _spawn("services.kv_transfer", environment=environment)
    host_server = new_server()
    rpc.add_BlockHostServicer_to_server(_Host(hashes), host_server)
    bind_unix(host_server, host_socket)
    await host_server.start()
    try:
        async with open_channel(unix_target(socket)) as channel:
            stub = rpc.KvTransferStub(channel)
            attach = pb.AttachRequest(
                worker_id=name,
                incarnation=new_incarnation(),
                fingerprint="bench",
                arena_path=str(arena.path),
                num_blocks=arena.num_blocks,
                block_bytes=block_bytes,
                host_socket=str(host_socket),
                role="decode",
                seal_table=str(table.path),
            )
            call = stub.Attach(attach, wait_for_ready=True)
            attached = await asyncio.wait_for(call.read(), 30)
            assert isinstance(attached, pb.Attached)
            yield _Node(name, stub, arena, table, attached.transfer_incarnation, process.pid)
            call.cancel()
    finally:
        process.terminate()
        assert process.wait(30) == 0, f"kv_transfer of {name} exited with {process.returncode}"
        await host_server.stop(0)
        table.unlink()
        arena.unlink()


async def _median_s(rounds: int, run: Callable[[], Awaitable[object]]) -> float:
    times = []
    for _ in range(rounds):
        started_s = time.perf_counter()
        await run()
        times.append(time.perf_counter() - started_s)
    return statistics.median(times)


def _unnamed_arena(name: str, num_blocks: int, block_bytes: int) -> np.ndarray:
    arena = SharedArena.create(Path(f"/dev/shm/tandem-bench-{os.getpid()}-{name}"), num_blocks, block_bytes)
    arena.unlink()
    return arena.blocks


def _serve_raw(tls: str, num_blocks: int, block_bytes: int) -> None:
    """The other process of the bare UCX measurement: prints its port, then answers each tag base with the blocks."""

    async def serve() -> None:
        source = _unnamed_arena("raw-source", num_blocks, block_bytes)
        source[:] = np.random.default_rng(0).integers(0, 256, source.shape, dtype=np.uint8)
        endpoints: asyncio.Queue[Endpoint] = asyncio.Queue()
        transport = UcxTransport(tls, "127.0.0.1", 0, on_failure=lambda error: os._exit(1))
        await transport.start(endpoints.put_nowait)
        print(transport.port, flush=True)
        endpoint = await endpoints.get()
        while count := int.from_bytes(await endpoint.receive(8), "little"):
            base = int.from_bytes(await endpoint.receive(8), "little")
            await endpoint.send_blocks(list(source[:count]), base)
        await endpoint.close()
        await transport.stop()

    asyncio.run(serve())


@contextlib.asynccontextmanager
async def _raw(tls: str, targets: np.ndarray) -> AsyncIterator[Callable[[int], Awaitable[object]]]:
    """Gives a function that fetches so many blocks over bare UCX from another process."""
    num_blocks, block_bytes = targets.shape
    arguments = ["--raw-server", "--tls", tls, "--blocks", str(num_blocks), "--block-bytes", str(block_bytes)]
    process = _spawn("loadtest.transfer_bench", *arguments)
    assert process.stdout is not None
    port = int(await asyncio.to_thread(process.stdout.readline))
    transport = UcxTransport(tls, "127.0.0.1", 0, on_failure=lambda error: os._exit(1))
    await transport.start(lambda endpoint: None)
    endpoint = await transport.connect("127.0.0.1", port)

    async def fetch(count: int) -> None:
        base = new_tag_base()
        arriving = endpoint.receive_blocks(list(targets[:count]), base)
        await endpoint.send(count.to_bytes(8, "little") + base.to_bytes(8, "little"))
        await arriving

    await fetch(num_blocks)
    yield fetch
    await endpoint.send((0).to_bytes(8, "little"))
    await asyncio.to_thread(process.wait, 30)
    await endpoint.close()
    await transport.stop()


async def _bench(tls: str, num_blocks: int, block_bytes: int, rounds: int) -> None:
    hashes = [BlockHash(os.urandom(16)) for _ in range(num_blocks)]
    block_ids = list(np.random.default_rng(1).permutation(num_blocks))
    with RedisServer() as redis, tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        url = redis.start(directory / "redis")
        async with (
            _node("holder", directory, url, tls, hashes, block_bytes) as holder,
            _node("puller", directory, url, tls, hashes, block_bytes) as puller,
        ):
            rng = np.random.default_rng(0)
            holder.arena.blocks[:] = rng.integers(0, 256, holder.arena.blocks.shape, dtype=np.uint8)
            await holder.seal_all(hashes)
            # Until the directory has told them of each other.
            while (await puller.pull(holder, [BlockHash(os.urandom(16))], [0])).error:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            await _report(holder, puller, tls, hashes, [int(i) for i in block_ids], rounds)


async def _report(
    holder: _Node, puller: _Node, tls: str, hashes: list[BlockHash], block_ids: list[int], rounds: int
) -> None:
    num_blocks, block_bytes = holder.arena.blocks.shape
    total = num_blocks * block_bytes
    print(
        f"{num_blocks} blocks x {block_bytes / MIB:g} MiB = {total / 1e6:.0f} MB, UCX {tls}, {rounds} rounds, medians"
    )
    started_s = time.perf_counter()
    first = await puller.pull(holder, hashes[:1], block_ids[:1])
    assert all(first.verified), first
    _row("first contact, 1 block", time.perf_counter() - started_s, block_bytes)
    started_s = time.perf_counter()
    await puller.pull(holder, hashes, block_ids)
    _row("first pull of all (page faults)", time.perf_counter() - started_s, total)

    verify: list[float] = []

    async def pull_all() -> None:
        reply = await puller.pull(holder, hashes, block_ids)
        assert all(reply.verified), reply
        verify.append(reply.verify_s)

    # Of the same kind of memory: pages of shared memory are small, and that costs either of them.
    async with _raw(tls, _unnamed_arena("raw-target", num_blocks, block_bytes)) as fetch_raw:
        targets = puller.arena.blocks
        pulls, raws, copies = await _interleaved(
            rounds, pull_all, lambda: fetch_raw(num_blocks), lambda: _copy(holder.arena.blocks, targets, block_ids)
        )
        _row("Pull", statistics.median(pulls), total)
        _row("  of it checksums at the receiver", statistics.median(verify), total)
        _row("bare UCX, the same messages", statistics.median(raws), total)
        _row("memcpy, shared memory to shared memory", statistics.median(copies), total)
        used = {node.name: _cpu_s(node.pid) for node in (puller, holder)}
        own_s = time.process_time()
        pulls_1, raws_1 = await _interleaved(
            10 * rounds, lambda: puller.pull(holder, hashes[:1], block_ids[:1]), lambda: fetch_raw(1)
        )
        _row("Pull, 1 block", statistics.median(pulls_1), block_bytes)
        _row("bare UCX, 1 block", statistics.median(raws_1), block_bytes)
        for node in (puller, holder):
            cpu_s = (_cpu_s(node.pid) - used[node.name]) / len(pulls_1)
            print(f"  CPU of the {node.name} per block {cpu_s * 1e3:6.2f} ms")
        print(f"  CPU of the caller and the bare UCX {(time.process_time() - own_s) / len(pulls_1) * 1e3:6.2f} ms")
    await asyncio.sleep(0.2)
    assert (puller.arena.blocks[block_ids] == holder.arena.blocks).all()

    saved = await holder.stub.Save(pb.SaveRequest(block_hashes=join_hashes(hashes), block_ids=range(num_blocks)))
    assert all(saved.saved)
    tier_s = await _median_s(rounds, lambda: holder.pull(None, hashes, list(range(num_blocks))))
    _row("Pull from the own host tier", tier_s, total)
    started_s = time.perf_counter()
    block_checksums(list(holder.arena.blocks))
    _row("xxh3 of all blocks, one thread", time.perf_counter() - started_s, total)
    print(
        f"Pull / bare UCX {_ratio(raws, pulls):.2f}   Pull / memcpy {_ratio(copies, pulls):.2f}   "
        f"(speed ratios: medians over rounds that were run in turn)"
    )


async def _copy(source: np.ndarray, target: np.ndarray, block_ids: list[int]) -> None:
    for block, block_id in zip(source, block_ids, strict=True):
        np.copyto(target[block_id], block)


async def _interleaved(rounds: int, *runs: Callable[[], Awaitable[object]]) -> list[list[float]]:
    """Seconds of each, run in turn, so that whatever else the machine does hits all alike."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, seconds in zip(runs, times, strict=True):
            started_s = time.perf_counter()
            await run()
            seconds.append(time.perf_counter() - started_s)
    return times


def _ratio(times: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _row(name: str, seconds: float, num_bytes: int) -> None:
    print(f"{name:40s} {seconds * 1e3:8.2f} ms {num_bytes / seconds / 1e9:7.2f} GB/s", flush=True)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tls", default="tcp", help="as TANDEM_TRANSFER_UCX_TLS: tcp, shm, or a UCX transport list")
    parser.add_argument("--blocks", type=int, default=125)
    parser.add_argument("--block-bytes", type=int, default=2 * MIB)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--raw-server", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.raw_server:
        _serve_raw(arguments.tls, arguments.blocks, arguments.block_bytes)
        return
    asyncio.run(_bench(arguments.tls, arguments.blocks, arguments.block_bytes, arguments.rounds))


if __name__ == "__main__":
    main()
