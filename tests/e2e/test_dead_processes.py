"""A process that dies costs time or one clear error: never a wrong token, never a leak, and its successor serves."""

from __future__ import annotations

import os
import signal
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

MODEL = "pydoc-mini"
LONG = "The report was read twice and filed. Nobody asked for a second copy. " * 40


def process_of(suite, name: str) -> dict:
    return next(process for process in suite.status()["processes"] if process["name"] == name)


def kill(suite, name: str) -> dict:
    process = process_of(suite, name)
    os.kill(process["pid"], signal.SIGKILL)
    return process


def wait_for_successor(suite, dead: dict, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        process = process_of(suite, dead["name"])
        ready = all(worker["ready"] for worker in suite.status()["workers"])
        if process["state"] == "ready" and process["pid"] != dead["pid"] and ready:
            return
        time.sleep(0.2)
    raise AssertionError(process_of(suite, dead["name"]))


def ask(suite, url: str = "", **fields):
    arguments = {"prompt": LONG, "max_tokens": 8, "temperature": 0} | fields
    extra = {"cache_salt": uuid.uuid4().hex, "timing": True, "ignore_eos": True}
    return suite.client(url).completions.create(model=MODEL, extra_body=extra, **arguments)


def timing_of(reply) -> dict:
    return reply.model_dump()["timing"]["sessions"][0]


def test_prefill_worker_killed_costs_a_local_prefill(suite):
    expected = ask(suite).choices[0].text
    dead = kill(suite, "prefill-0")
    reply = ask(suite)
    assert reply.choices[0].text == expected
    assert timing_of(reply)["mode"] == "local"
    wait_for_successor(suite, dead)
    suite.wait_for_baseline()


@pytest.mark.parametrize("victim", ["prefill-0.transfer", "decode-0.transfer"])
def test_kv_transfer_killed_costs_recomputes_until_its_successor_attached(suite, victim):
    expected = ask(suite).choices[0].text
    workers = {name: process_of(suite, name)["pid"] for name in ("prefill-0", "decode-0", "decode-1")}
    dead, killed_s = kill(suite, victim), time.monotonic()
    fetched_s = {}
    with ThreadPoolExecutor(2) as clients:
        # Two at a time, so that either decode worker gets one: perhaps only one has lost its sidecar.
        while time.monotonic() < killed_s + 60 and len(fetched_s) < 2:
            for reply in clients.map(lambda _: ask(suite), range(2)):
                assert reply.choices[0].text == expected
                timing = timing_of(reply)
                if timing["mode"] == "remote_prefill" and timing["fetched_blocks"] >= 40:
                    fetched_s.setdefault(timing["decode_worker"], time.monotonic() - killed_s)
    print(f"{victim} killed; fetched again after", {worker: f"{at_s:.2f} s" for worker, at_s in fetched_s.items()})
    assert len(fetched_s) == 2
    wait_for_successor(suite, dead)
    assert {name: process_of(suite, name)["pid"] for name in workers} == workers
    suite.wait_for_baseline()


def test_redis_killed_loses_no_request(suite):
    kill(suite, "redis")
    for _ in range(5):
        assert ask(suite).choices[0].finish_reason == "length"
    suite.wait_for_baseline()
