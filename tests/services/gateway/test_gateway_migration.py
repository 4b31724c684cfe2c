"""A session whose worker is lost, cut off or drained goes on at another one, from the next token."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from services.gateway.sessions.session import Finish, FinishReason
from shared.rpc import silence

BODY = {"model": "pydoc-mini", "prompt": "hi", "max_tokens": 200}
ANSWER = "the whole answer, word by word"


def script_all(running, token_ids, **script):
    for worker in running.workers.values():
        worker.script.token_ids = token_ids
        for name, value in script.items():
            setattr(worker.script, name, value)


def first_and_second(running):
    """The workers in the order in which the only session came to them."""
    return sorted(running.workers.values(), key=lambda worker: len(worker.submits[0].resumed))


@pytest.mark.parametrize("cause", ["die_after", "give_up_after"])
@pytest.mark.parametrize("stream", [False, True])
async def test_stream_goes_on_from_the_next_token(start_gateway, text_ids, cause, stream):
    async with start_gateway(num_workers=2) as running:
        script_all(running, text_ids(ANSWER), step_s=0.01)
        setattr(running.workers["decode-0"].script, cause, 3)
        body = {**BODY, "stream": stream, "seed": 5}
        if stream:
            pieces = [c async for c in await running.openai.completions.create(**body)]
            text = "".join(c.choices[0].text for c in pieces if c.choices)
        else:
            reply = await running.openai.completions.create(**body, extra_body={"timing": True})
            text = reply.choices[0].text
            assert reply.usage.completion_tokens == len(text_ids(ANSWER)) + 1
            [session] = reply.model_dump()["timing"]["sessions"]
            code = "worker_lost" if cause == "die_after" else "worker_draining"
            assert (session["attempts"], session["migrations"]) == (2, [code])
        assert text == ANSWER
        old, new = first_and_second(running)
        [choice] = new.submits[0].resumed
        assert list(choice.output_token_ids) == text_ids(ANSWER)[:3]
        assert new.submits[0].sampling == old.submits[0].sampling
        assert new.submits[0].session_id != old.submits[0].session_id
        assert running.metric("tandem_migrations_total") == 1


@pytest.mark.parametrize("what", ["tokens", "vectors"])
async def test_what_a_worker_owes_that_answers_nothing_comes_from_another_one(
    start_gateway, text_ids, monkeypatch, what
):
    monkeypatch.setattr(silence, "QUIET_S", 0.1)
    monkeypatch.setattr(silence, "ANSWER_WITHIN_S", 0.5)
    async with start_gateway(num_workers=2) as running:
        script_all(running, text_ids(ANSWER))
        running.workers["decode-0"].script.hangs = True
        if what == "tokens":
            reply = await running.openai.completions.create(**BODY, extra_body={"timing": True})
            assert reply.choices[0].text == ANSWER
            assert reply.model_dump()["timing"]["sessions"][0]["migrations"] == ["worker_lost"]
            assert running.workers["decode-0"].submits
        else:
            reply = await running.openai.embeddings.create(model="pydoc-mini", input="hi")
            assert reply.data
            assert running.workers["decode-0"].embeds


async def test_a_worker_that_has_nothing_to_say_keeps_its_sessions(start_gateway, text_ids, monkeypatch):
    monkeypatch.setattr(silence, "QUIET_S", 0.05)
    monkeypatch.setattr(silence, "ANSWER_WITHIN_S", 3.0)
    async with start_gateway(num_workers=2) as running:
        script_all(running, text_ids("one"), step_s=1.0)
        reply = await running.openai.completions.create(**BODY, extra_body={"timing": True})
        assert reply.model_dump()["timing"]["sessions"][0]["attempts"] == 1


async def test_every_choice_goes_on_from_its_own_tokens(start_gateway, text_ids):
    async with start_gateway(num_workers=2) as running:
        script_all(running, text_ids(ANSWER), step_s=0.01)
        running.workers["decode-0"].script.die_after = 4
        reply = await running.openai.completions.create(**BODY, n=3)
        assert [choice.text for choice in reply.choices] == [ANSWER] * 3
        new = first_and_second(running)[1]
        assert [len(choice.output_token_ids) for choice in new.submits[0].resumed] == [4, 4, 4]


async def test_logprobs_and_stop_strings_are_those_of_the_undisturbed_run(start_gateway, text_ids):
    async with start_gateway(num_workers=2) as running:
        script_all(running, text_ids(ANSWER))
        body = {**BODY, "logprobs": 2, "stop": ["word by"]}
        undisturbed = await running.openai.completions.create(**body)
        script_all(running, text_ids(ANSWER), step_s=0.01, cached_tokens=16)
        running.workers["decode-0"].script.die_after = len(text_ids("the whole answer, word"))
        migrated = await running.openai.completions.create(**body)
        assert migrated.choices[0] == undisturbed.choices[0]
        assert migrated.usage == undisturbed.usage
        assert running.metric("tandem_migrations_total") == 1


async def test_finished_choices_stay_as_they_are(start_gateway, text_ids):
    async with start_gateway(num_workers=2) as running:
        script_all(running, text_ids(ANSWER), step_s=0.01)
        dying = running.workers["decode-0"]
        dying.script.hold = True
        request = asyncio.create_task(running.openai.completions.create(**BODY, n=2))
        await dying.wait_for(lambda: dying.submits)
        stream = running.gateway.health.workers._streams[dying.record.incarnation]
        [(session, _)] = stream._sessions.values()
        first, second = session.choices
        first.push(text_ids("done")[0])
        first.end(Finish(FinishReason.LENGTH))
        second.push(text_ids(ANSWER)[0])
        await dying.stop()
        reply = await request
        assert [choice.text for choice in reply.choices] == ["done", ANSWER]
        [submit] = running.workers["decode-1"].submits
        assert [(c.is_finished, len(c.output_token_ids)) for c in submit.resumed] == [(True, 1), (False, 1)]


async def test_cached_tokens_are_those_of_the_worker_that_began(start_gateway, text_ids):
    async with start_gateway(num_workers=2) as running:
        script_all(running, text_ids(ANSWER), step_s=0.01, cached_tokens=48)
        running.workers["decode-0"].script.cached_tokens = 0
        running.workers["decode-0"].script.die_after = 2
        reply = await running.openai.completions.create(**BODY)
        assert reply.usage.prompt_tokens_details.cached_tokens == 0


async def test_session_that_kills_its_workers_is_not_passed_on_for_ever(start_gateway):
    async with start_gateway(num_workers=4, max_lost_workers=2) as running:
        script_all(running, [300] * 50, step_s=0.01, die_after=1)
        reply = await running.http.post("/v1/completions", json={**BODY, "stream": True})
        assert '"worker_lost"' in reply.text
        assert reply.text.endswith("data: [DONE]\n\n")
        assert sum(len(worker.submits) for worker in running.workers.values()) == 2


async def test_attempts_are_bounded_also_when_workers_only_drain(start_gateway):
    async with start_gateway(num_workers=4, max_attempts=3) as running:
        script_all(running, [300] * 50, step_s=0.01, give_up_after=0)
        reply = await running.http.post("/v1/completions", json=BODY)
        assert reply.json()["error"]["code"] == "worker_draining"
        assert sum(len(worker.submits) for worker in running.workers.values()) == 3


async def test_no_other_worker_ends_the_stream_with_a_clear_error_in_bounded_time(start_gateway, text_ids):
    async with start_gateway(migration_wait_s=0.2) as running:
        script_all(running, text_ids(ANSWER), step_s=0.01, give_up_after=3)
        reply = await running.http.post("/v1/completions", json={**BODY, "stream": True})
        assert '"worker_draining"' in reply.text
        assert "no decode worker became ready within 0.2 s" in reply.text
        assert reply.text.endswith("data: [DONE]\n\n")


async def test_lost_connection_to_the_only_worker_is_survived(start_gateway, text_ids):
    async with start_gateway() as running:
        script_all(running, text_ids(ANSWER), step_s=0.01, die_after=3)
        request = asyncio.create_task(running.http.post("/v1/completions", json=BODY))
        await running.worker.wait_for(lambda: running.worker.submits)
        await asyncio.sleep(0.1)
        running.worker.script.die_after = None
        reply = await request
        assert reply.json()["choices"][0]["text"] == ANSWER
        assert len(running.worker.submits) == 2


async def test_running_session_never_goes_on_with_other_weights(start_gateway, text_ids):
    async with start_gateway(num_workers=2, migration_wait_s=0.2) as running:
        script_all(running, text_ids(ANSWER), step_s=0.01, give_up_after=2)
        other = running.workers["decode-1"]
        other.record = replace(other.record, fingerprint="green")
        await asyncio.sleep(0.5)
        reply = await running.http.post("/v1/completions", json=BODY)
        assert reply.json()["error"]["code"] == "worker_draining"
        assert not other.submits


async def test_client_that_leaves_while_its_session_waits_for_a_worker_ends_it(start_gateway, text_ids):
    async with start_gateway(migration_wait_s=90) as running:
        script_all(running, text_ids(ANSWER), give_up_after=2)
        request = asyncio.create_task(running.http.post("/v1/completions", json=BODY))
        await running.worker.wait_for(lambda: running.worker.submits)
        await asyncio.sleep(0.1)
        request.cancel()
        async with asyncio.timeout(30):
            while running.metric("tandem_gateway_requests_running"):
                await asyncio.sleep(0.01)


async def ask_and_hang(running, worker):
    """A request of which this worker has sent four tokens, when the fifth step does not end."""
    asked = asyncio.create_task(running.openai.completions.create(**BODY, extra_body={"timing": True}))
    async with asyncio.timeout(20):
        while not worker.submits:
            await asyncio.sleep(0.005)
    await asyncio.sleep(0.05)
    worker.record = replace(worker.record, hung=True, ready=False)
    return asked


async def test_a_session_whose_step_does_not_end_goes_on_at_another_worker(start_gateway, text_ids):
    async with start_gateway(num_workers=2) as running:
        script_all(running, text_ids(ANSWER))
        hung = running.workers["decode-0"]
        running.workers["decode-1"].record = replace(running.workers["decode-1"].record, ready=False)
        hung.script.step_s = 600
        await until_known(running, ["decode-0"])
        asked = await ask_and_hang(running, hung)
        running.workers["decode-1"].record = replace(running.workers["decode-1"].record, ready=True)
        reply = await asyncio.wait_for(asked, 20)
        assert reply.choices[0].text == ANSWER
        [session] = reply.model_dump()["timing"]["sessions"]
        assert session["migrations"] == ["worker_lost"]
        assert [abort.session_id for abort in hung.aborts] == [hung.submits[0].session_id]


async def test_a_session_that_cannot_go_elsewhere_waits_for_its_step(start_gateway, text_ids):
    async with start_gateway() as running:
        script_all(running, text_ids(ANSWER))
        hung = running.workers["decode-0"]
        hung.script.step_s = 0.3
        asked = await ask_and_hang(running, hung)
        reply = await asyncio.wait_for(asked, 20)
        assert reply.choices[0].text == ANSWER
        assert running.metric("tandem_migrations_total") == 0


async def until_known(running, ready):
    """The gateway would send work to these workers and no others."""
    async with asyncio.timeout(20):
        while running.gateway.health.report()["decode_workers"] != ready:
            await asyncio.sleep(0.02)
