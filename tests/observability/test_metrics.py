"""What a scraper and a probe see."""

import dataclasses
import os
import signal
import socket

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from shared.engine.block_pool import BlockCounts
from shared.engine.sequence import FinishReason
from shared.engine.stats import EngineStats
from shared.engine.step import StepFigures, StepOutputs
from shared.errors import ConfigurationError
from shared.metrics.http import serve_metrics
from shared.metrics.registry import exposition, new_registry
from shared.metrics.transfer import DiskFigures, TierFigures, TransferFigures, TransferMetrics
from shared.metrics.worker import WorkerMetrics

pytestmark = pytest.mark.timeout(30)

STATS = EngineStats(
    blocks=BlockCounts(total=100, free=50, cached=30, used=12, pinned=5, quarantined=3),
    oldest_pin_s=1.5,
    running=2,
    waiting=1,
    waiting_for_kv=4,
    queued_prefill_tokens=77,
    steps=10,
    last_step_s=0.004,
    last_progress_s=0.0,
    used_slots=97,
    allocated_slots=100,
    preemptions=6,
    prefix_query_tokens=1000,
    prefix_hit_tokens=400,
    prefill_tokens_per_s=1234.5,
    neighbour_slowdown=1.25,
    prefilled_tokens=600,
    generated_tokens=50,
    failure="",
)


def samples(registry):
    """`{(name, labels other than model and role): value}` of everything of ours."""
    body, _ = exposition(registry)
    found = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "role")}
            found[sample.name, *labels.values()] = sample.value
    return found


@dataclasses.dataclass
class Ended:
    finish_reason: FinishReason


def test_worker_metrics_show_the_engine_under_vllms_names():
    metrics = WorkerMetrics(role="decode", model="pydoc-mini")
    assert ("vllm:num_requests_running",) not in samples(metrics.registry)
    metrics.follow(lambda: STATS)
    found = samples(metrics.registry)
    assert found["vllm:num_requests_running",] == 2
    assert found["vllm:num_requests_waiting",] == 1
    assert found["vllm:kv_cache_usage_perc",] == found["vllm:gpu_cache_usage_perc",] == 0.20
    assert found["vllm:num_preemptions_total",] == 6
    assert found["vllm:prefix_cache_hits_total",] == 400
    assert found["tandem_kv_slot_utilization",] == 0.97
    assert found["tandem_kv_oldest_pin_seconds",] == 1.5
    assert [found["tandem_kv_blocks", state] for state in ("free", "cached", "used", "pinned", "quarantined")] == [
        50,
        30,
        12,
        5,
        3,
    ]
    assert 'vllm:num_requests_running{model_name="pydoc-mini",role="decode"} 2.0' in (
        exposition(metrics.registry)[0].decode()
    )


def test_steps_are_counted_and_what_changes_between_them_is_no_step():
    metrics = WorkerMetrics(role="decode", model="m")
    metrics.observe_step(StepOutputs(finished=[Ended(FinishReason.STOP)], step=StepFigures(0.01, 18)))
    metrics.observe_step(StepOutputs(finished=[Ended(FinishReason.ABORTED)]))
    found = samples(metrics.registry)
    assert found["tandem_engine_step_seconds_count",] == 1
    assert found["vllm:iteration_tokens_total_sum",] == 18
    assert found["tandem_sequences_finished_total", "stop"] == 1
    assert found["tandem_sequences_finished_total", "aborted"] == 1


def test_a_followed_engine_is_read_when_scraped():
    metrics = WorkerMetrics(role="prefill", model="m")
    current = STATS
    metrics.follow(lambda: current)
    current = dataclasses.replace(STATS, waiting_for_kv=9)
    assert samples(metrics.registry)["tandem_num_requests_waiting_for_kv",] == 9


def test_where_a_prompts_kv_came_from_is_counted_in_blocks_and_bytes():
    metrics = WorkerMetrics(role="decode", model="m")
    report = {"mode": "remote_prefill", "local_blocks": 1, "held_blocks": 0, "prefilled_blocks": 7}
    report |= {"missed_blocks": 2, "skipped_blocks": 3}
    metrics.observe_acquisition(**report, fetched_bytes=700, fetch_s=0.01, prefill_s=0.2)
    metrics.observe_acquisition(
        **{**report, "mode": "local", "prefilled_blocks": 0}, fetched_bytes=0, fetch_s=0.0, prefill_s=0.0
    )
    found = samples(metrics.registry)
    assert found["tandem_kv_acquisitions_total", "remote_prefill"] == 1
    assert found["tandem_kv_acquired_blocks_total", "local"] == 2
    assert found["tandem_kv_acquired_blocks_total", "prefill"] == 7
    assert found["tandem_kv_fetched_bytes_total",] == 700
    assert found["tandem_kv_skipped_fetch_blocks_total",] == 6
    assert found["tandem_kv_fetch_seconds_count",] == found["tandem_remote_prefill_seconds_count",] == 1


def test_transfer_metrics_account_for_every_block_asked_for():
    memory, disk = TierFigures(3, 30, 300, 7, 1), TierFigures(4, 40, 400, 8, 0)
    figures = TransferFigures(True, 1, 10, 20, memory, DiskFigures(disk, True, False, 90, 60, 2, 1), 5, 7, False)
    metrics = TransferMetrics(lambda: figures)
    metrics.observe_pull(asked=10, verified=6, missing=2, mismatched=1, seconds=0.1, verify_s=0.01)
    found = samples(metrics.registry)
    outcomes = {outcome: found["tandem_transfer_pulled_blocks_total", outcome] for outcome in ("verified", "failed")}
    assert outcomes == {"verified": 6, "failed": 1}
    assert found["tandem_transfer_received_bytes_total",] == 20
    assert found["tandem_host_tier_bytes",] == 30
    assert found["tandem_host_tier_corrupt_blocks_total",] == 1
    assert found["tandem_disk_tier_hits_total",] == 8
    assert (found["tandem_disk_tier_readable",], found["tandem_disk_tier_writable",]) == (1, 0)
    assert found["tandem_disk_tier_failures_total",] == 1
    assert (found["tandem_hints_unpublished_blocks",], found["tandem_hints_stale_blocks_total",]) == (5, 7)
    assert found["tandem_directory_healthy",] == 0


async def test_the_listener_serves_metrics_and_both_probes():
    state = [True, ""]
    server = await serve_metrics("127.0.0.1", 0, new_registry(), lambda: tuple(state))
    async with httpx.AsyncClient(base_url=server.url) as client:
        reply = await client.get("/metrics")
        assert reply.headers["content-type"].startswith("text/plain")
        assert "process_resident_memory_bytes" in reply.text
        openmetrics = await client.get("/metrics", headers={"accept": "application/openmetrics-text"})
        assert openmetrics.text.endswith("# EOF\n")
        assert (await client.get("/live")).status_code == 200
        assert (await client.get("/ready")).json() == {"ready": True, "reason": ""}
        state[:] = False, "draining"
        reply = await client.get("/ready")
        assert (reply.status_code, reply.json()) == (503, {"ready": False, "reason": "draining"})
        assert (await client.get("/other")).status_code == 404
    await server.close()
    await server.close()
    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.ConnectError):
            await client.get(f"{server.url}/live")


async def test_the_listener_leaves_signals_to_the_service():
    before = signal.getsignal(signal.SIGTERM)
    server = await serve_metrics("127.0.0.1", 0, new_registry(), lambda: (True, ""))
    async with httpx.AsyncClient() as client:
        await client.get(f"{server.url}/live")
    assert signal.getsignal(signal.SIGTERM) is before
    await server.close()


async def test_a_listener_that_is_off_opens_nothing():
    before = len(os.listdir("/proc/self/fd"))
    server = await serve_metrics("127.0.0.1", -1, new_registry(), lambda: (True, ""))
    assert server.url == ""
    assert len(os.listdir("/proc/self/fd")) == before
    await server.close()


async def test_a_taken_metrics_port_is_a_configuration_error():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigurationError, match="for metrics"):
        await serve_metrics("127.0.0.1", taken.getsockname()[1], new_registry(), lambda: (True, ""))
