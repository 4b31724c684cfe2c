"""KV blocks from one worker's device memory to another's, the way kv_transfer moves and checks them.

Two processes map the arenas of others by their handles, send and receive over UCX, and take the checksums of what was
sent and of what arrived. With two GPUs the arenas are on one each, once with both visible to both processes, and once
as in two pods, which see one each. Without CUDA IPC UCX takes blocks through host memory, as it does between two hosts.

    python -m loadtest.gpu.measure_handover --out loadtest/gpu/results

Needs a GPU, ucxx and cuda.bindings.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from loadtest.gpu.measure_kernels import hardware
from loadtest.gpu.report import Check, Report, Row
from loadtest.gpu.timing import Stopwatch
from protos import kv_transfer_pb2 as pb
from shared.device_arena import DeviceArena, open_device
from shared.transfer.checksum import block_checksums
from shared.transfer.transport import Endpoint
from shared.transfer.ucx import UcxTransport
from shared.worker.checksum_kernels import checksum_kernels

_ROUNDS = 15
_BLOCK_BYTES = 2 << 20
_SIZES = [1, 16, 128]
_HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process works: which GPUs it sees, and the index of its own among them."""

    visible: str
    device: int


@dataclass(frozen=True, slots=True)
class Way:
    """From where to where, and by which transports: see `ucx_options`."""

    name: str
    sender: Place
    receiver: Place
    tls: str = "cuda"


@dataclass(frozen=True, slots=True)
class Shared:
    """One side's arena, as the process beside it is told of it."""

    place: Place
    tls: str
    handle: bytes
    offset: int
    kernels: bytes
    num_blocks: int

    def open(self) -> DeviceArena:
        open_device(self.place.device)
        kernels = pb.ChecksumKernels.FromString(self.kernels)
        return DeviceArena.open(self.handle, self.offset, self.num_blocks, _BLOCK_BYTES, kernels)


@dataclass(frozen=True, slots=True)
class Times:
    """Medians, in seconds: of a transfer; of the checksums of both sides, taken at the same time."""

    transfer_s: float
    checksums_s: float


def main() -> None:
    """Measure and write `<gpu>-handover.json` and `.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("loadtest/gpu/results"), help="folder of the results")
    options = parser.parse_args()
    rows: list[Row] = []
    damaged = 0
    for way in _ways():
        for num_blocks in _SIZES:
            found, wrong = _measure(way, num_blocks)
            rows += found
            damaged += wrong
    for row in rows:
        print(f"{row.group}: {row.name}: {row.time_us:.0f} us, {row.rate:.1f} {row.unit}", flush=True)
    report = Report(
        hardware("cuda"),
        [Check("blocks that arrived damaged", float(damaged), 0.0)],
        rows,
        title="KV between two workers of one host, measured",
        script="measure_handover",
        oracle="the bytes sent",
    )
    name = torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-")
    count = torch.cuda.device_count()
    report.write(options.out, f"{name}{f'-x{count}' if count > 1 else ''}-handover")


def _ways() -> list[Way]:
    ways = [Way("on one GPU", Place("0", 0), Place("0", 0))]
    if torch.cuda.device_count() > 1:
        apart = Place("0", 0), Place("1", 0)
        ways.append(Way("between two GPUs, both visible to both processes", Place("0,1", 0), Place("0,1", 1)))
        ways.append(Way("between two GPUs, each process sees its own", *apart))
        ways.append(Way("between two GPUs, without CUDA IPC: through host memory", *apart, "tcp,self,cuda_copy"))
    return ways


def _measure(way: Way, num_blocks: int) -> tuple[Iterator[Row], int]:
    """Rows, and how many blocks arrived damaged."""
    devices = [int(place.visible.split(",")[place.device]) for place in (way.sender, way.receiver)]
    shape = (num_blocks, _BLOCK_BYTES)
    source = torch.randint(0, 256, shape, dtype=torch.uint8, device=f"cuda:{devices[0]}")
    target = torch.zeros(shape, dtype=torch.uint8, device=f"cuda:{devices[1]}")
    for device in devices:
        torch.cuda.synchronize(device)
    sides = [_share(memory, place, way.tls) for memory, place in ((source, way.sender), (target, way.receiver))]
    times = _hand_over(*sides)
    wrong = int((source.cpu() != target.cpu()).any(dim=1).sum())
    copy_us = Stopwatch("cuda").microseconds(lambda: target.copy_(source))
    return _rows(way.name, num_blocks, times, copy_us), wrong


def _share(memory: torch.Tensor, place: Place, tls: str) -> Shared:
    num_blocks = memory.shape[0]
    with torch.cuda.device(memory.device):
        kernels = checksum_kernels(_BLOCK_BYTES)
        arena = DeviceArena.export(memory.data_ptr(), num_blocks, _BLOCK_BYTES, kernels)
    return Shared(place, tls, arena.handle, arena.offset, kernels.SerializeToString(), num_blocks)


def _rows(where: str, num_blocks: int, times: Times, copy_us: float) -> Iterator[Row]:
    size = num_blocks * _BLOCK_BYTES
    limit = size / copy_us / 1e3
    for what, seconds in [
        ("over UCX", times.transfer_s),
        ("checksums of both sides", times.checksums_s),
        ("over UCX, then checksums", times.transfer_s + times.checksums_s),
    ]:
        name, rate = f"{num_blocks} blocks of {_BLOCK_BYTES >> 20} MiB, {what}", size / seconds / 1e9
        yield Row(where, name, seconds * 1e6, rate, "GB/s", limit, "device copy", copy_us)


def _hand_over(source: Shared, target: Shared) -> Times:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    port_end, port_start = spawn.Pipe(duplex=False)
    work = [(source, _serve, (source, port_start)), (target, _fetch, (target, port_end, theirs))]
    processes = []
    for side, run, arguments in work:
        os.environ["CUDA_VISIBLE_DEVICES"] = side.place.visible
        processes.append(spawn.Process(target=run, args=arguments, daemon=True))
        processes[-1].start()
    del os.environ["CUDA_VISIBLE_DEVICES"]
    if not ours.poll(120):
        raise RuntimeError("no blocks arrived within 120 s")
    times: Times = ours.recv()
    for process in processes:
        process.kill()
        process.join()
    return times


def _serve(side: Shared, port_start: Connection) -> None:
    asyncio.run(_send(side, port_start))


async def _send(side: Shared, port_start: Connection) -> None:
    arena = side.open()
    blocks = list(arena.blocks)
    accepted: asyncio.Queue[Endpoint] = asyncio.Queue()
    transport = UcxTransport(side.tls, _HOST, 0, on_failure=lambda error: os._exit(70))
    await transport.start(accepted.put_nowait)
    port_start.send(transport.port)
    endpoint = await accepted.get()
    while True:
        await endpoint.receive(1)
        await endpoint.send_blocks(blocks, 1 << 16)
        await endpoint.receive(1)
        started_s = time.perf_counter()
        block_checksums(blocks)
        await endpoint.send(int((time.perf_counter() - started_s) * 1e9).to_bytes(8, "little"))


def _fetch(side: Shared, port_end: Connection, answer: Connection) -> None:
    asyncio.run(_receive(side, port_end.recv(), answer))


async def _receive(side: Shared, port: int, answer: Connection) -> None:
    arena = side.open()
    blocks = list(arena.blocks)
    transport = UcxTransport(side.tls, _HOST, 0, on_failure=lambda error: os._exit(70))
    await transport.start(lambda endpoint: None)
    endpoint = await transport.connect(_HOST, port)
    transfers, checks = [], []
    for _ in range(_ROUNDS):
        arriving = endpoint.receive_blocks(blocks, 1 << 16)
        started_s = time.perf_counter()
        await endpoint.send(b"1")
        await arriving
        transfers.append(time.perf_counter() - started_s)
        await endpoint.send(b"2")
        started_s = time.perf_counter()
        block_checksums(blocks)
        mine_s = time.perf_counter() - started_s
        theirs_s = int.from_bytes(await endpoint.receive(8), "little") / 1e9
        checks.append(max(mine_s, theirs_s))
    answer.send(Times(sorted(transfers)[_ROUNDS // 2], sorted(checks)[_ROUNDS // 2]))
    await asyncio.sleep(30)


if __name__ == "__main__":
    main()
