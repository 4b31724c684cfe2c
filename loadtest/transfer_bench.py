"""Measures the KV-transfer service beside its floor: `python -m loadtest.transfer_bench`.

Two real kv_transfer processes, each beside a stand-in for its worker, pull blocks through the whole path: gRPC on the
Unix socket, Fetch, pins, UCX, checksums. In the same run the same messages go over bare UCX between two processes (the
transport of `shared/transfer` and nothing else) and through memcpy from one shared-memory file to another, so that the
ratios hold however busy the machine is. Two more processes do the same without checksums: what they save is what
checking costs.
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
from services.kv_transfer.prefault import prefault
from shared.directory.redis_server import RedisServer
from shared.identity import BlockHash, BlockId, join_hashes, new_incarnation, split_hashes
from shared.kv_arena import SharedArena
from shared.log import configure_logging
from shared.rpc import bind_unix, new_server, open_channel, unix_target
from shared.seal_table import SealTable, table_path
from shared.transfer.checksum import block_checksums
from shared.transfer.protocol import new_tag_base
from shared.transfer.transport import Endpoint
from shared.transfer.ucx import UcxTransport
from shared.worker.pull_stream import PullStream

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
        self.pulls = PullStream(stub)
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
        return await self.pulls.pull(
            pb.PullRequest(
                session_id="bench",
                holder_id=holder.name if holder else "",
                holder_incarnation=holder.incarnation if holder else "",
                block_hashes=join_hashes(hashes),
                block_ids=block_ids,
                timeout_s=60,
            )
        )


def _spawn(module: str, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", module, *arguments], env=environment, stdout=subprocess.PIPE)


@contextlib.asynccontextmanager
async def _node(
    name: str, module: str, directory: Path, redis_url: str, tls: str, hashes: list[BlockHash], block_bytes: int
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
    process = _spawn(module, environment=environment)
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
            node = _Node(name, stub, arena, table, attached.transfer_incarnation, process.pid)
            yield node
            node.pulls.close()
            call.cancel()
    finally:
        process.terminate()
        assert process.wait(30) == 0, f"kv_transfer of {name} exited with {process.returncode}"
        await host_server.stop(0)
        table.unlink()
        arena.unlink()


def _unnamed_arena(name: str, num_blocks: int, block_bytes: int) -> np.ndarray:
    arena = SharedArena.create(Path(f"/dev/shm/tandem-bench-{os.getpid()}-{name}"), num_blocks, block_bytes)
    arena.unlink()
    prefault(arena)
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


@contextlib.asynccontextmanager
async def _pair(
    module: str, directory: Path, redis_url: str, tls: str, hashes: list[BlockHash], block_bytes: int
) -> AsyncIterator[tuple[_Node, _Node]]:
    """A holder with all blocks, sealed, and a puller that knows it."""
    suffix = module.rpartition(".")[2]
    async with (
        _node(f"holder-{suffix}", module, directory, redis_url, tls, hashes, block_bytes) as holder,
        _node(f"puller-{suffix}", module, directory, redis_url, tls, hashes, block_bytes) as puller,
    ):
        rng = np.random.default_rng(0)
        holder.arena.blocks[:] = rng.integers(0, 256, holder.arena.blocks.shape, dtype=np.uint8)
        await holder.seal_all(hashes)
        # Until the directory has told them of each other.
        while (await puller.pull(holder, [BlockHash(os.urandom(16))], [0])).error:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        yield holder, puller


async def _bench(tls: str, num_blocks: int, block_bytes: int, rounds: int) -> None:
    hashes = [BlockHash(os.urandom(16)) for _ in range(num_blocks)]
    block_ids = [int(i) for i in np.random.default_rng(1).permutation(num_blocks)]
    with RedisServer() as redis, tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        where = (directory, redis.start(directory / "redis"), tls, hashes, block_bytes)
        async with (
            _pair("services.kv_transfer", *where) as pair,
            _pair("loadtest.unchecked_sidecar", *where) as unchecked,
            # Of the same kind of memory: the size of its pages costs either of them.
            _raw(tls, _unnamed_arena("raw-target", num_blocks, block_bytes)) as fetch_raw,
        ):
            print(f"{num_blocks} blocks x {block_bytes / MIB:g} MiB, UCX {tls}, {rounds} rounds in turn, medians")
            await _report_firsts(*pair, hashes, block_ids)
            await _report_all(pair, unchecked, fetch_raw, hashes, block_ids, rounds)
            await _report_one(*pair, fetch_raw, hashes, block_ids, 10 * rounds)
            await _report_tier(pair[0], hashes, rounds)


async def _report_firsts(holder: _Node, puller: _Node, hashes: list[BlockHash], block_ids: list[int]) -> None:
    for name, count in (("first contact, 1 block", 1), ("first pull of all (page faults)", len(hashes))):
        started_s = time.perf_counter()
        first = await puller.pull(holder, hashes[:count], block_ids[:count])
        assert all(first.verified), first
        _row(name, time.perf_counter() - started_s, count * holder.arena.block_bytes)


async def _report_all(
    pair: tuple[_Node, _Node],
    unchecked: tuple[_Node, _Node],
    fetch_raw: Callable[[int], Awaitable[object]],
    hashes: list[BlockHash],
    block_ids: list[int],
    rounds: int,
) -> None:
    holder, puller = pair
    total = holder.arena.blocks.nbytes
    verify: list[float] = []

    async def pull_all() -> None:
        reply = await puller.pull(holder, hashes, block_ids)
        assert all(reply.verified), reply
        verify.append(reply.verify_s)

    async def pull_unchecked() -> None:
        assert all((await unchecked[1].pull(unchecked[0], hashes, block_ids)).verified)

    await pull_unchecked()  # its page faults
    pulls, bares, raws, copies = await _interleaved(
        rounds,
        pull_all,
        pull_unchecked,
        lambda: fetch_raw(len(hashes)),
        lambda: _copy(holder.arena.blocks, puller.arena.blocks, block_ids),
    )
    _row("Pull", statistics.median(pulls), total)
    _row("  of it checksums at the receiver, beside", statistics.median(verify), total)
    _row("Pull without checksums at either side", statistics.median(bares), total)
    _row("bare UCX, the same messages", statistics.median(raws), total)
    _row("memcpy, shared memory to shared memory", statistics.median(copies), total)
    assert (puller.arena.blocks[block_ids] == holder.arena.blocks).all()
    added_s = statistics.median(a - b for a, b in zip(pulls, bares, strict=True))
    print(
        f"Pull / bare UCX {_ratio(raws, pulls):.2f}   Pull / memcpy {_ratio(copies, pulls):.2f}   (speed ratios)   "
        f"checksums add {added_s * 1e3:.1f} ms to a Pull"
    )
    for name, run in (("Pull", pull_all), ("Pull without checksums", pull_unchecked)):
        pids = [node.pid for node in (pair if run is pull_all else unchecked)]
        print(f"  CPU of both sidecars, {name}: {await _cpu_of(pids, run, rounds) * 1e3:.1f} ms")
    own_s = await _cpu_of([os.getpid()], lambda: fetch_raw(len(hashes)), rounds)
    print(f"  CPU of bare UCX's receiver: {own_s * 1e3:.1f} ms")


async def _report_one(
    holder: _Node,
    puller: _Node,
    fetch_raw: Callable[[int], Awaitable[object]],
    hashes: list[BlockHash],
    block_ids: list[int],
    rounds: int,
) -> None:
    def pull_one() -> Awaitable[object]:
        return puller.pull(holder, hashes[:1], block_ids[:1])

    pulls, raws = await _interleaved(rounds, pull_one, lambda: fetch_raw(1))
    _row("Pull, 1 block", statistics.median(pulls), holder.arena.block_bytes)
    _row("bare UCX, 1 block", statistics.median(raws), holder.arena.block_bytes)
    for node in (puller, holder):
        print(f"  CPU of {node.name} per block: {await _cpu_of([node.pid], pull_one, rounds) * 1e3:.2f} ms")


async def _report_tier(holder: _Node, hashes: list[BlockHash], rounds: int) -> None:
    total, block_ids = holder.arena.blocks.nbytes, range(len(hashes))
    saved = await holder.stub.Save(pb.SaveRequest(block_hashes=join_hashes(hashes), block_ids=block_ids))
    assert all(saved.saved)
    tier_s = await _interleaved(rounds, lambda: holder.pull(None, hashes, list(block_ids)))
    _row("Pull from the own host tier", statistics.median(tier_s[0]), total)
    started_s = time.perf_counter()
    block_checksums(list(holder.arena.blocks))
    _row("xxh3 of all blocks, one thread", time.perf_counter() - started_s, total)


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


async def _cpu_of(pids: list[int], run: Callable[[], Awaitable[object]], rounds: int) -> float:
    """Seconds of CPU time of these processes for one run."""
    before_s = sum(map(_cpu_s, pids))
    for _ in range(rounds):
        await run()
    return (sum(map(_cpu_s, pids)) - before_s) / rounds


def _cpu_s(pid: int) -> float:
    """Of all threads that live, by the scheduler's clock: ticks are too coarse."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


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
    configure_logging("transfer_bench", "warning")
    if arguments.raw_server:
        _serve_raw(arguments.tls, arguments.blocks, arguments.block_bytes)
        return
    asyncio.run(_bench(arguments.tls, arguments.blocks, arguments.block_bytes, arguments.rounds))


if __name__ == "__main__":
    main()
