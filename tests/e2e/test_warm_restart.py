"""A worker that was killed: its kv_transfer serves on, and the next life starts with the KV of the last one."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid

import pytest

from protos import worker_pb2 as pb

PROMPT = [(37 * i + 11) % 1500 + 300 for i in range(400)]
BLOCKS = 24


def worker_named(suite, worker_id: str) -> dict | None:
    return next((w for w in suite.status()["workers"] if w["worker_id"] == worker_id), None)


def pid_of(suite, name: str) -> int:
    return next(process["pid"] for process in suite.status()["processes"] if process["name"] == name)


def wait_for_next_life(suite, before: dict) -> dict:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        worker = worker_named(suite, before["worker_id"])
        if worker and worker["ready"] and worker["incarnation"] != before["incarnation"]:
            return worker
        time.sleep(0.1)
    raise AssertionError(before["worker_id"])


def hint(worker: dict) -> pb.HolderHint:
    holder = pb.PeerRef(worker_id=worker["worker_id"], incarnation=worker["transfer"]["incarnation"])
    return pb.HolderHint(holder=holder, num_blocks=BLOCKS)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_gone_workers_kv_is_fetched_from_its_kv_transfer_and_found_by_its_next_life(suite, generate, number):
    first, second = (worker_named(suite, f"decode-{i}") for i in range(2))
    salt = uuid.uuid4().hex
    before = await generate(first, PROMPT, cache_salt=salt)
    os.kill(pid_of(suite, "decode-0"), number)
    await asyncio.sleep(0.5)
    meanwhile = await generate(second, PROMPT, cache_salt=salt, holders=[hint(first)])
    assert meanwhile.token_ids == before.token_ids
    assert meanwhile.finish.timeline.fetched_blocks == BLOCKS
    again = await generate(wait_for_next_life(suite, first), PROMPT, cache_salt=salt)
    assert again.token_ids == before.token_ids
    assert again.finish.timeline.local_blocks == BLOCKS
    suite.wait_for_baseline()


async def test_a_killed_kv_transfer_harms_no_kv_and_is_back_soon(suite, generate):
    first, second = (worker_named(suite, f"decode-{i}") for i in range(2))
    salt = uuid.uuid4().hex
    before = await generate(first, PROMPT, cache_salt=salt)
    os.kill(pid_of(suite, "decode-0.transfer"), signal.SIGKILL)
    started_s = time.monotonic()
    unharmed = await generate(first, PROMPT, cache_salt=salt)
    assert unharmed.token_ids == before.token_ids
    assert unharmed.finish.timeline.local_blocks == BLOCKS
    fetched = 0
    while not fetched and time.monotonic() - started_s < 60:
        now = worker_named(suite, "decode-0")
        if now and now["transfer"] and now["transfer"]["incarnation"] != first["transfer"]["incarnation"]:
            reply = await generate(second, PROMPT, cache_salt=salt, holders=[hint(now)])
            assert reply.token_ids == before.token_ids
            fetched = reply.finish.timeline.fetched_blocks
            salt = salt if fetched else uuid.uuid4().hex
            if not fetched:
                await generate(first, PROMPT, cache_salt=salt)
    print(f"transfers resumed after {time.monotonic() - started_s:.2f} s")
    assert fetched == BLOCKS
    suite.wait_for_baseline()
