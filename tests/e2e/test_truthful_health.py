"""Hung is noticed in seconds, by those who must know; busy is not taken for hung; both come back by themselves: F30."""

import time

import pytest

from loadtest.detection_bench import Cluster, false_alarms, hung_engine, hung_sidecar, hung_step, stopped
from shared.worker.status import STALL_S

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

# An unanswered ping or three heartbeats, and room for a crowded machine.
DETECTED_WITHIN_S = 10.0


@pytest.fixture(scope="module")
def cluster(suite):
    return Cluster(suite.run_dir)


def test_a_hung_decode_worker_gets_no_more_work_and_is_taken_back(cluster):
    detected_s, _ = hung_engine(cluster, "decode-1")
    assert detected_s < DETECTED_WITHIN_S


def test_a_stream_whose_step_does_not_end_goes_on_at_another_worker(cluster):
    try:
        moved_s, _ = hung_step(cluster, ["decode-0", "decode-1"])
    except PermissionError as exc:
        pytest.skip(f"ptrace: {exc}")
    assert moved_s < STALL_S + DETECTED_WITHIN_S


def test_requests_are_served_while_a_decode_worker_hangs(cluster):
    with stopped(cluster.process("decode-1")["pid"]):
        deadline = time.monotonic() + DETECTED_WITHIN_S
        while len(cluster.decode_workers()) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for _ in range(4):
            assert cluster.complete()["choices"][0]["text"]


def test_a_prefill_worker_whose_sidecar_hangs_says_so(cluster):
    with stopped(cluster.process("prefill-0.transfer")["pid"]):
        deadline = time.monotonic() + DETECTED_WITHIN_S
        while (said := cluster.ready("prefill-0"))[0]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert "kv_transfer" in said[1]
        reply = cluster.complete(prompt="The report was read twice. " * 30, cache_salt="hung", timing=True)
        assert reply["timing"]["sessions"][0]["mode"] == "local"
    detected_s, back_s = hung_sidecar(cluster, "prefill-0")
    assert detected_s < DETECTED_WITHIN_S
    assert back_s < DETECTED_WITHIN_S


def test_busy_is_ready(cluster):
    names = ["gateway", "decode-0", "decode-1", "prefill-0", "decode-0.transfer"]
    looks, alarms = false_alarms(cluster, names, seconds=6, streams=12)
    assert looks >= 20
    assert alarms == 0


def test_a_cluster_that_was_idle_longer_than_any_keepalive_serves_at_once(cluster):
    """F20."""
    cluster.complete(prompt="The report was read twice. " * 30, cache_salt="before")
    time.sleep(7)
    started = time.monotonic()
    reply = cluster.complete(prompt="The report was read twice. " * 30, cache_salt="after", timing=True)
    assert reply["timing"]["sessions"][0]["mode"] == "remote_prefill"
    assert time.monotonic() - started < 15
