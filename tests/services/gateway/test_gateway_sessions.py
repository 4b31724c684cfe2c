"""Cancels, retries, and where sessions are sent."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import httpx
import pytest

from shared.directory.client import Directory
from shared.directory.records import TransferRecord
from shared.errors import Overloaded
from shared.identity import Fingerprint, Incarnation, WorkerId, extend_hashes, namespace_hash

BODY = {"model": "pydoc-mini", "prompt": "hi", "max_tokens": 200}


@pytest.mark.parametrize("stream", [False, True])
async def test_client_that_leaves_before_the_first_token_aborts_the_work(running, stream):
    running.worker.script.hold = True
    request = asyncio.create_task(running.http.post("/v1/completions", json={**BODY, "stream": stream}))
    await running.worker.wait_for(lambda: running.worker.submits)
    request.cancel()
    await running.worker.wait_for(lambda: running.worker.aborts)
    assert running.worker.aborts[0].session_id == running.worker.submits[0].session_id
    assert not running.worker.aborts[0].sequences


async def test_client_that_leaves_a_stream_aborts_the_work(running):
    running.worker.script.token_ids = [300] * 200
    running.worker.script.step_s = 0.02
    async with running.http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as reply:
        async for _ in reply.aiter_bytes():
            break
    await running.worker.wait_for(lambda: running.worker.aborts)
    assert running.worker.aborts[0].session_id == running.worker.submits[0].session_id


async def test_client_that_leaves_aborts_every_prompt_of_its_batch(running):
    running.worker.script.hold = True
    request = asyncio.create_task(running.http.post("/v1/completions", json={**BODY, "prompt": ["a", "b", "c"]}))
    await running.worker.wait_for(lambda: len(running.worker.submits) == 3)
    request.cancel()
    await running.worker.wait_for(lambda: len(running.worker.aborts) == 3)


async def test_client_that_leaves_while_no_worker_is_there_ends_the_wait(start_gateway):
    async with start_gateway(num_workers=0, worker_wait_s=30) as running:
        with pytest.raises(httpx.ReadTimeout):
            await running.http.post("/v1/completions", json=BODY, timeout=0.2)
        await asyncio.sleep(0.1)
        assert running.metric("tandem_gateway_requests_running") == 0


async def test_finished_request_aborts_nothing_and_leaves_nothing(running):
    await running.http.post("/v1/completions", json=BODY)
    await running.http.post("/v1/completions", json={**BODY, "stream": True})
    await asyncio.sleep(0.05)
    assert not running.worker.aborts
    assert running.metric("tandem_gateway_requests_running") == 0
    assert running.metric("vllm:request_success_total") == 2


async def test_stopped_choice_ends_well_when_its_worker_is_lost_meanwhile(start_gateway, text_ids):
    async with start_gateway(abort_grace_s=10) as running:
        running.worker.script.token_ids = text_ids("one STOP two three four")
        running.worker.script.die_after = len(text_ids("one STOP two"))
        running.worker.script.step_s = 0.02
        reply = await running.http.post("/v1/completions", json={**BODY, "stop": "STOP"})
        assert reply.status_code == 200
        assert reply.json()["choices"][0]["text"] == "one "
        assert reply.json()["choices"][0]["finish_reason"] == "stop"


async def test_full_worker_passes_the_session_on(start_gateway):
    async with start_gateway(num_workers=2) as running:
        running.workers["decode-0"].script.failure = Overloaded("the queue is full")
        reply = await running.http.post("/v1/completions", json=BODY)
        assert reply.status_code == 200


async def test_burst_is_spread_over_the_workers(start_gateway):
    async with start_gateway(num_workers=2) as running:
        for worker in running.workers.values():
            worker.script.step_s = 0.05
        await asyncio.gather(*(running.http.post("/v1/completions", json=BODY) for _ in range(8)))
        assert [len(worker.submits) for worker in running.workers.values()] == [4, 4]


async def test_prefill_workers_and_holders_are_named_to_the_worker(
    start_gateway, fresh_redis_url, fake_prefill_record, text_ids
):
    prompt = "json.dumps does serialize. " * 10
    fingerprint = Fingerprint("fp")
    async with Directory(fresh_redis_url) as directory:
        hashes = extend_hashes(namespace_hash(fingerprint, "salt"), text_ids(prompt), 16)
        holder = await directory.claim_holder(Incarnation("sidecar-life"), lambda: hashes[:2])
        transfer = TransferRecord(
            WorkerId("decode-9"), Incarnation("sidecar-life"), fingerprint, "127.0.0.1:2", holder.index, 1
        )
        async with start_gateway(others=(fake_prefill_record, transfer)) as running:
            body = {**BODY, "prompt": prompt, "cache_salt": "salt", "timing": True}
            reply = await running.http.post("/v1/completions", json=body)
            [submit] = running.worker.submits
            assert [ref.incarnation for ref in submit.prefill_candidates] == ["prefill-life"]
            [hint] = submit.holders
            assert (hint.holder.worker_id, hint.holder.incarnation) == ("decode-9", "sidecar-life")
            assert hint.num_blocks == 2
            assert reply.json()["timing"]["sessions"][0]["predicted"]["mode"] == "remote_prefill"

            unsalted = await running.http.post("/v1/completions", json={**BODY, "prompt": prompt})
            assert unsalted.status_code == 200
            assert not running.worker.submits[1].holders


async def test_restarted_worker_is_met_under_its_new_life(running):
    worker = running.worker
    worker.script.die_after = 1
    await running.http.post("/v1/completions", json=BODY)
    worker.script.die_after = None
    worker.record = replace(worker.record, incarnation=Incarnation("second-life"), started_at=2.0)
    await worker.wait_for(lambda: worker.hellos[-1].incarnation == "second-life")
    assert (await running.http.post("/v1/completions", json=BODY)).status_code == 200


async def test_work_goes_on_while_redis_is_down(start_gateway, redis_server):
    async with start_gateway(redis_url=redis_server.url) as running:
        redis_server.stop()
        reply = await running.http.post("/v1/completions", json={**BODY, "prompt": "json " * 100})
        assert reply.status_code == 200
        assert (await running.http.get("/ready")).status_code == 200


async def test_storm_of_leaving_clients_leaves_nothing(running):
    running.worker.script.token_ids = [300] * 100
    running.worker.script.step_s = 0.005
    chance = random.Random(7)

    async def impatient(index):
        body = {**BODY, "stream": index % 2 == 0, "n": 1 + index % 3}
        try:
            async with asyncio.timeout(chance.uniform(0.0, 0.5)):
                await running.http.post("/v1/completions", json=body)
        except TimeoutError:
            pass

    await asyncio.gather(*(impatient(index) for index in range(150)))
    await running.worker.wait_for(lambda: running.metric("tandem_gateway_requests_running") == 0, timeout_s=2)
    aborted = {abort.session_id for abort in running.worker.aborts}
    submitted = {submit.session_id for submit in running.worker.submits}
    assert aborted <= submitted
    reply = await running.http.post("/v1/completions", json={**BODY, "timing": True, "max_tokens": 2})
    assert reply.status_code == 200
    assert running.open_sessions == 0
