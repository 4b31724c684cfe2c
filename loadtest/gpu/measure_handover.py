"""KV blocks from one worker's device memory to another's, on one GPU, the way kv_transfer moves them.

Two processes map the arenas of others by their handles, and send and receive over UCX.

    python -m loadtest.gpu.measure_handover --out loadtest/gpu/results

Needs the GPU, ucxx and cuda.bindings.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from loadtest.gpu.measure_kernels import hardware
from loadtest.gpu.report import Check, Report, Row
from loadtest.gpu.timing import Stopwatch
from shared.device_arena import DeviceArena, open_device
from shared.transfer.checksum import block_checksums
from shared.transfer.transport import Endpoint
from shared.transfer.ucx import UcxTransport

_NUM_BLOCKS, _BLOCK_BYTES, _ROUNDS = 128, 2 << 20, 8
_HOST = "127.0.0.1"


def main() -> None:
    """Measure and write `<gpu>-handover.json` and `.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("loadtest/gpu/results"), help="folder of the results")
    options = parser.parse_args()
    source = torch.randint(0, 256, (_NUM_BLOCKS, _BLOCK_BYTES), dtype=torch.uint8, device="cuda")
    target = torch.zeros_like(source)
    torch.cuda.synchronize()
    seconds, verify_s = _hand_over(source, target)
    wrong = int((source != target).any(dim=1).sum())
    size = source.numel()
    copy_us = Stopwatch("cuda").microseconds(lambda: target.copy_(source))
    what = f"{_NUM_BLOCKS} blocks of {_BLOCK_BYTES >> 20} MiB"
    rows = [
        _row(f"{what}, device to device over UCX (CUDA IPC)", seconds * 1e6, size, copy_us),
        _row(f"{what}, checksums of both sides after it", (seconds + verify_s) * 1e6, size, copy_us),
    ]
    for row in rows:
        print(f"{row.name}: {row.rate:.1f} {row.unit}, a device copy {size / copy_us / 1e3:.0f} GB/s", flush=True)
    report = Report(
        hardware("cuda"),
        [Check("blocks that arrived damaged", float(wrong), 0.0)],
        rows,
        title="KV between two workers on one GPU, measured",
        script="measure_handover",
        oracle="the bytes sent",
    )
    name = torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-")
    report.write(options.out, f"{name}-handover")


def _row(name: str, time_us: float, size: int, copy_us: float) -> Row:
    limit = size / copy_us / 1e3
    return Row("hand-over", name, time_us, size / time_us / 1e3, "GB/s", limit, "device copy", copy_us)


def _hand_over(source: torch.Tensor, target: torch.Tensor) -> tuple[float, float]:
    """Median seconds of a transfer, and of both sides' checksums at the same time."""
    spawn = multiprocessing.get_context("spawn")
    handles = [DeviceArena.export(t.data_ptr(), *t.shape).handle for t in (source, target)]
    ours, theirs = spawn.Pipe()
    port_end, port_start = spawn.Pipe(duplex=False)
    processes = [
        spawn.Process(target=_serve, args=(handles[0], port_start), daemon=True),
        spawn.Process(target=_fetch, args=(handles[1], port_end, theirs), daemon=True),
    ]
    for process in processes:
        process.start()
    if not ours.poll(120):
        raise RuntimeError("no blocks arrived within 120 s")
    times: tuple[float, float] = ours.recv()
    for process in processes:
        process.kill()
        process.join()
    return times


def _serve(handle: bytes, port_start: Connection) -> None:
    asyncio.run(_send(handle, port_start))


async def _send(handle: bytes, port_start: Connection) -> None:
    open_device()
    arena = DeviceArena.open(handle, _NUM_BLOCKS, _BLOCK_BYTES)
    blocks = list(arena.blocks)
    accepted: asyncio.Queue[Endpoint] = asyncio.Queue()
    transport = UcxTransport("cuda", _HOST, 0, on_failure=lambda error: os._exit(70))
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


def _fetch(handle: bytes, port_end: Connection, answer: Connection) -> None:
    asyncio.run(_receive(handle, port_end.recv(), answer))


async def _receive(handle: bytes, port: int, answer: Connection) -> None:
    open_device()
    arena = DeviceArena.open(handle, _NUM_BLOCKS, _BLOCK_BYTES)
    blocks = list(arena.blocks)
    transport = UcxTransport("cuda", _HOST, 0, on_failure=lambda error: os._exit(70))
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
    answer.send((sorted(transfers)[_ROUNDS // 2], sorted(checks)[_ROUNDS // 2]))
    await asyncio.sleep(30)


if __name__ == "__main__":
    main()
