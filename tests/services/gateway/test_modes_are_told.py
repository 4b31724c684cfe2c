"""How a prompt is prefilled follows a setting; what it came to is in the reply and in the metrics."""

from __future__ import annotations

from dataclasses import replace

import pytest

PROMPT = "json.dumps does serialize. " * 10


async def predicted_mode(running) -> str:
    body = {"model": "pydoc-mini", "prompt": PROMPT, "max_tokens": 4, "timing": True}
    reply = await running.http.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()["timing"]["sessions"][0]["predicted"]["mode"]


def placements(running) -> dict[str, float]:
    lines = running.gateway.metrics.exposition()[0].decode().splitlines()
    pairs = (line.split(" ") for line in lines if line.startswith("tandem_placements_total{"))
    return {labels.partition('mode="')[2].partition('"')[0]: float(value) for labels, value in pairs}


@pytest.mark.parametrize("why", ["none", "not ready", "draining"])
async def test_a_prompt_that_no_prefill_worker_can_take_is_local_and_said_to_be(
    start_gateway, fake_prefill_record, why
):
    records = {
        "none": (),
        "not ready": (replace(fake_prefill_record, ready=False),),
        "draining": (replace(fake_prefill_record, draining=True),),
    }
    async with start_gateway(others=records[why], placement="remote") as running:
        assert await predicted_mode(running) == "local"
        assert not running.worker.submits[0].prefill_candidates
        assert placements(running) == {"local": 1}


@pytest.mark.parametrize(("policy", "mode"), [("remote", "remote_prefill"), ("local", "local")])
async def test_the_policy_decides_whether_prefill_workers_are_named(start_gateway, fake_prefill_record, policy, mode):
    async with start_gateway(others=(fake_prefill_record,), placement=policy) as running:
        assert await predicted_mode(running) == mode
        assert [ref.worker_id for ref in running.worker.submits[0].prefill_candidates] == (
            ["prefill-0"] if policy == "remote" else []
        )
        assert placements(running) == {mode: 1}
