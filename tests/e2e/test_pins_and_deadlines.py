"""Pins live exactly as long as the call that needs them, deadlines have timers of their own, a leg that fails ends the
other."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time

import grpc
import httpx
import pytest

from loadtest.fleet import Fleet
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from shared.errors import WorkerDraining
from shared.rpc import error_from_rpc, open_channel

BLOCK = 16
NUM_WORKERS = 3

# A caller of Prefill in a process of its own: waits for the last block, says so, and never fetches.
CALLER = """
import asyncio, sys
from protos import worker_pb2 as pb, worker_pb2_grpc as rpc
from shared.rpc import open_channel

async def main():
    address, incarnation, fingerprint, first = sys.argv[1:]
    tokens = [(37 * i + int(first)) % 1000 + 300 for i in range(320)]
    request = pb.PrefillRequest(session_id="held", incarnation=incarnation, fingerprint=fingerprint, token_ids=tokens,
                                num_blocks=20)
    async for progress in rpc.WorkerStub(open_channel(address)).Prefill(request):
        if progress.sealed_blocks == 20:
            print("sealed", flush=True)

asyncio.run(main())
"""


def prompt(num_tokens: int, first: int) -> list[int]:
    return [(41 * i + first) % 1000 + 300 for i in range(num_tokens)]


def worker_of(suite, role: str) -> dict:
    return next(worker for worker in suite.status()["workers"] if worker["role"] == role)


def pid_of(suite, worker: dict) -> int:
    return next(p["pid"] for p in suite.status()["processes"] if p["name"] == worker["worker_id"])


def prefill_request(worker: dict, num_blocks: int, first: int) -> pb.PrefillRequest:
    return pb.PrefillRequest(
        session_id=f"direct-{first}",
        incarnation=worker["incarnation"],
        fingerprint=worker["fingerprint"],
        token_ids=prompt(num_blocks * BLOCK, first),
        num_blocks=num_blocks,
    )


async def until_pinned(fleet: Fleet, num_blocks: int, timeout_s: float = 10.0) -> None:
    """Until the prefill worker pins so many blocks: for a moment it may pin more, those it is saving."""
    deadline_s = time.perf_counter() + timeout_s
    while (pinned := [s.blocks.pinned for s in await fleet.statuses("prefill")]) != [num_blocks]:
        assert time.perf_counter() < deadline_s, f"{pinned} blocks are pinned, not {num_blocks}"
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "silent"])
async def test_caller_that_is_gone_between_prefill_and_fetch_frees_its_pins(suite, number):
    async with Fleet(suite.redis_url) as fleet:
        await fleet.until_ready(NUM_WORKERS)
        await fleet.until_free()
        worker = worker_of(suite, "prefill")
        arguments = [worker["address"], worker["incarnation"], worker["fingerprint"], str(int(number))]
        caller = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CALLER, *arguments, stdout=asyncio.subprocess.PIPE
        )
        try:
            assert await caller.stdout.readline() == b"sealed\n"
            await until_pinned(fleet, 20)
            caller.send_signal(number)
            started_s = time.perf_counter()
            freed_s = await fleet.until_free(timeout_s=15) - started_s
            print(f"pins free after {freed_s:.3f} s")
        finally:
            if caller.returncode is None:
                caller.kill()
            await caller.wait()


async def test_deadline_ends_a_session_whose_prefill_worker_hangs(suite, generate):
    async with Fleet(suite.redis_url) as fleet:
        await fleet.until_ready(NUM_WORKERS)
        prefill, decode = worker_of(suite, "prefill"), worker_of(suite, "decode")
        candidate = pb.PeerRef(worker_id=prefill["worker_id"], incarnation=prefill["incarnation"])
        pid = pid_of(suite, prefill)
        os.kill(pid, signal.SIGSTOP)
        try:
            started_s = time.perf_counter()
            result = await generate(decode, prompt(400, 1), prefill_candidates=[candidate], timeout_s=0.5)
            assert result.failure.code == "request_timeout"
            assert time.perf_counter() - started_s < 15
        finally:
            os.kill(pid, signal.SIGCONT)
        await fleet.until_free()


async def test_prefill_worker_that_falls_silent_costs_a_local_prefill_and_not_its_timeout(suite, generate):
    async with Fleet(suite.redis_url) as fleet:
        await fleet.until_ready(NUM_WORKERS)
        prefill, decode = worker_of(suite, "prefill"), worker_of(suite, "decode")
        expected = await generate(decode, prompt(400, 2))
        candidate = pb.PeerRef(worker_id=prefill["worker_id"], incarnation=prefill["incarnation"])
        pid = pid_of(suite, prefill)
        os.kill(pid, signal.SIGSTOP)
        try:
            started_s = time.perf_counter()
            result = await generate(decode, prompt(400, 2), prefill_candidates=[candidate], cache_salt="other")
            assert time.perf_counter() - started_s < 15  # the keepalive's, not the 30 s of a slow prefill
        finally:
            os.kill(pid, signal.SIGCONT)
        assert result.token_ids == expected.token_ids
        assert result.finish.timeline.mode == "local"
        await fleet.until_ready(NUM_WORKERS)
        await fleet.until_free()


async def test_draining_prefill_worker_keeps_what_is_owed_and_takes_nothing_new(suite):
    async with Fleet(suite.redis_url) as fleet:
        await fleet.until_ready(NUM_WORKERS)
        worker = worker_of(suite, "prefill")
        async with open_channel(worker["address"]) as channel:
            stub = rpc.WorkerStub(channel)
            owed = stub.Prefill(prefill_request(worker, 4, 3))
            while (await owed.read()).sealed_blocks < 4:
                pass
            os.kill(pid_of(suite, worker), signal.SIGTERM)
            await asyncio.sleep(1)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Prefill(prefill_request(worker, 4, 4)).read()
            assert isinstance(error_from_rpc(caught.value), WorkerDraining)
            status = next(s for s in await fleet.statuses() if s.worker_id == worker["worker_id"])
            assert (status.ready, status.reason, status.blocks.pinned) == (False, "draining", 4)
            assert not owed.done()
            owed.cancel()
        await asyncio.sleep(1)
        await fleet.until_ready(NUM_WORKERS)
        await fleet.until_free()


@pytest.fixture
def odd_worker(suite, tmp_path):
    """A decode worker of the same model whose KV is laid out otherwise, in the same fleet."""
    common = {"REDIS_URL": suite.redis_url, "WORKER_ID": "odd-0"}
    transfer = {**common, "SOCKET": str(tmp_path / "t.sock"), "HOST": "127.0.0.1"}
    worker = {
        **common,
        "DRAIN_TIMEOUT_S": "1",
        "TRANSFER_SOCKET": str(tmp_path / "t.sock"),
        "RUN_DIR": str(tmp_path),
        "ARENA_DIR": str(tmp_path),
        "SERVED_MODEL_NAME": "pydoc-mini",
        "BLOCK_SIZE": "32",
        "KV_CACHE_BYTES": str(32 << 20),
        "THREADS": "1",
    }
    processes = [start("kv_transfer", "TRANSFER", transfer), start("decode", "WORKER", worker)]
    try:
        yield "odd-0"
        for process in reversed(processes):
            process.terminate()
            assert process.wait(30) == 0
    finally:
        for process in processes:
            process.kill()


def start(service: str, prefix: str, settings: dict) -> subprocess.Popen:
    environment = {**os.environ, **{f"TANDEM_{prefix}_{name}": value for name, value in settings.items()}}
    return subprocess.Popen([sys.executable, "-m", f"services.{service}"], env=environment, stderr=subprocess.DEVNULL)


@pytest.mark.timeout(300)  # starts two more processes
async def test_workers_of_unequal_fingerprints_in_one_fleet_are_never_paired(suite, generate, odd_worker):
    async with Fleet(suite.redis_url) as fleet:
        await fleet.until_ready(NUM_WORKERS + 1)
        by_id = {worker["worker_id"]: worker for worker in suite.status()["workers"]}
        odd, prefill = by_id[odd_worker], worker_of(suite, "prefill")
        assert odd["fingerprint"] != prefill["fingerprint"]
        candidate = pb.PeerRef(worker_id=prefill["worker_id"], incarnation=prefill["incarnation"])
        result = await generate(odd, prompt(400, 5), prefill_candidates=[candidate])
        assert (result.finish.timeline.mode, result.finish.timeline.prefill_worker) == ("local", "")
        async with open_channel(prefill["address"]) as channel:
            request = prefill_request(odd, 4, 6)
            request.incarnation = prefill["incarnation"]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rpc.WorkerStub(channel).Prefill(request).read()
            assert error_from_rpc(caught.value).code == "fingerprint_mismatch"
        sessions, placed = [], set()
        while len(placed) < 2:  # the cheaper worker takes all that it can take at once
            first = len(sessions)
            assert first < 64
            sessions += await asyncio.gather(*(asyncio.to_thread(ask, suite, first + i) for i in range(8 + first)))
            placed = {session["decode_worker"] for session in sessions}
        for session in sessions:
            assert session["prefill_worker"] == ("" if session["decode_worker"] == odd_worker else prefill["worker_id"])


def ask(suite, first: int) -> dict:
    body = {"model": "pydoc-mini", "prompt": prompt(200, 100 + first), "max_tokens": 60, "timing": True}
    reply = httpx.post(f"{suite.url}/v1/completions", json={**body, "ignore_eos": True}, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()["timing"]["sessions"][0]
