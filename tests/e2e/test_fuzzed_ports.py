"""Garbage at every port: gRPC refuses it, UCX may die of it, the workers serve on. `loadtest.fuzz` runs longer."""

import asyncio
import time
from pathlib import Path

import httpx
import pytest

from loadtest.fuzz import FETCH_METHODS, HOST_METHODS, LOCAL_METHODS, Usage, fuzz_port, known_values, worker_methods
from loadtest.fuzz_ucx import be_admitted, fuzz_ucx, ucx_port
from shared.rpc import unix_target

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

PROMPT = "What does json.dumps do? " * 20
GRPC_SECONDS, UCX_SECONDS = 2, 4
MAX_GROWTH_BYTES, MAX_GROWTH_DESCRIPTORS = 96 << 20, 24


@pytest.fixture(scope="module")
def fuzzed(start_another):
    return start_another("--prefill", "1", "--decode", "1", "--threads", "1", "--kv-cache-bytes", "32MiB")


def ask(suite, **extra):
    body = {"model": "pydoc-mini", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "timing": True, **extra}
    reply = httpx.post(f"{suite.url}/v1/completions", json=body, timeout=60).raise_for_status().json()
    return reply["choices"][0]["text"], reply["timing"]["sessions"][0]["mode"]


def usage_of(suite):
    return {process["name"]: Usage.of(process["pid"]) for process in suite.status()["processes"]}


def assert_bounded(before, after):
    for name, was in before.items():
        now = after[name]
        assert now.rss_bytes - was.rss_bytes < MAX_GROWTH_BYTES, name
        assert now.descriptors - was.descriptors < MAX_GROWTH_DESCRIPTORS, name


async def test_no_garbage_ends_a_process_that_speaks_grpc(fuzzed):
    expected, _ = ask(fuzzed)
    before, workers = usage_of(fuzzed), fuzzed.status()["workers"]
    for worker in workers:
        for address, methods in (
            (worker["address"], worker_methods(worker)),
            (worker["transfer"]["address"], FETCH_METHODS),
        ):
            outcomes = await fuzz_port(address, methods, known_values(worker), seed=5, seconds=GRPC_SECONDS)
            assert len(outcomes) > 3, outcomes
    for socket, methods in (("prefill-0.transfer.sock", LOCAL_METHODS), ("prefill-0.host.sock", HOST_METHODS)):
        await fuzz_port(
            unix_target(fuzzed.run_dir / socket), methods, known_values(workers[0]), seed=5, seconds=GRPC_SECONDS
        )
    fuzzed.wait_for_baseline()
    after = usage_of(fuzzed)
    assert {name: usage.pid for name, usage in after.items()} == {name: usage.pid for name, usage in before.items()}
    assert_bounded(before, after)
    assert ask(fuzzed, cache_salt="after")[0] == expected


async def test_damaged_connects_cost_a_sidecar_at_most_and_never_its_worker(fuzzed):
    expected, _ = ask(fuzzed)
    before = usage_of(fuzzed)
    name = "prefill-0.transfer"
    worker = next(w for w in fuzzed.status()["workers"] if w["role"] == "prefill")
    log = Path(next(p["log"] for p in fuzzed.status()["processes"] if p["name"] == name))
    await be_admitted(worker["transfer"], worker["fingerprint"])
    assert await fuzz_ucx(ucx_port(log), seed=7, seconds=UCX_SECONDS)
    assert ask(fuzzed, cache_salt="during")[0] == expected

    deadline = time.monotonic() + 30
    while (mode := ask(fuzzed, cache_salt=f"{time.monotonic()}"))[1] != "remote_prefill":
        assert time.monotonic() < deadline, mode
        await asyncio.sleep(0.1)
    after = usage_of(fuzzed)
    assert after["prefill-0"].pid == before["prefill-0"].pid
    assert after["decode-0"].pid == before["decode-0"].pid
    assert_bounded(before, after)
