"""OpenAI's Responses API with OpenAI's client; records in a real Redis, a scripted worker behind."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise

import openai
import pytest

from services.gateway.replies.choice_text import Delta
from services.gateway.responses.input_items import chat_turns
from services.gateway.responses.output import OutputItems
from services.gateway.responses.translate import EXTRAS
from services.gateway.syntax.families import ToolFamily
from shared.access.api_keys import mint
from shared.access.key_store import FileKeys
from shared.errors import CapacityExceeded
from shared.identity import unpack_tokens

CALL = '<tool_call>\n{"name": "look_up", "arguments": {"name": "json.dumps"}}\n</tool_call>'
PARAMETERS = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
TOOLS = [{"type": "function", "name": "look_up", "description": "Finds", "parameters": PARAMETERS, "strict": None}]


async def until(ask, status):
    """The response as soon as it has that status."""
    async with asyncio.timeout(30):
        while (response := await ask()).status != status:
            await asyncio.sleep(0.02)
    return response


async def test_a_response_has_the_workers_text(running, text_ids):
    running.worker.script.token_ids = text_ids("Serialize an object.")
    response = await running.openai.responses.create(
        model="pydoc-mini", input="What does json.dumps do?", instructions="Be brief.", metadata={"a": "b"}
    )
    assert response.output_text == "Serialize an object."
    assert (response.status, response.error, response.metadata) == ("completed", None, {"a": "b"})
    [submit] = running.worker.submits
    assert response.usage.input_tokens == len(unpack_tokens(submit.prompt_tokens))
    assert response.usage.output_tokens == len(text_ids("Serialize an object.")) + 1
    assert response.usage.input_tokens_details.cached_tokens == 16
    await running.openai.chat.completions.create(
        model="pydoc-mini",
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What does json.dumps do?"},
        ],
    )
    assert running.worker.submits[1].prompt_tokens == submit.prompt_tokens


async def test_events_come_in_order_and_add_up_to_the_response(running, text_ids):
    running.worker.script.token_ids = text_ids("Grüße, 世界 🎉!")
    stream = await running.openai.responses.create(model="pydoc-mini", input="hi", stream=True)
    events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert "".join(event.delta for event in events[4:-4]) == events[-1].response.output_text == "Grüße, 世界 🎉!"
    assert events[-4].text == "Grüße, 世界 🎉!"
    kept = await running.openai.responses.retrieve(events[0].response.id)
    assert kept.output == events[-1].response.output


async def test_the_clients_stream_helper_reads_it(running, text_ids):
    running.worker.script.token_ids = text_ids("two words")
    async with running.openai.responses.stream(model="pydoc-mini", input="hi") as stream:
        async for _ in stream:
            pass
        assert (await stream.get_final_response()).output_text == "two words"


async def test_the_next_turn_names_the_last_and_sees_its_items(running, text_ids):
    running.worker.script.token_ids = text_ids("One.")
    create = running.openai.responses.create
    first = await create(model="pydoc-mini", input="Count", instructions="Never mind")
    second = await create(model="pydoc-mini", input=[{"role": "user", "content": "On"}], previous_response_id=first.id)
    third = await create(model="pydoc-mini", input="And on", previous_response_id=second.id)
    messages = [
        {"role": "user", "content": "Count"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "On"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "And on"},
    ]
    await running.openai.chat.completions.create(model="pydoc-mini", messages=messages)
    assert running.worker.submits[2].prompt_tokens == running.worker.submits[3].prompt_tokens
    assert third.previous_response_id == second.id
    items = await running.openai.responses.input_items.list(second.id)
    assert [(item.role, item.content[0].text) for item in items.data] == [("user", "On")]
    assert items.data[0].id.startswith("msg_")


async def test_input_items_come_in_pages(running):
    turns = [{"role": "user", "content": str(i)} for i in range(5)]
    response = await running.openai.responses.create(model="pydoc-mini", input=turns)
    texts = [
        item.content[0].text
        async for item in running.openai.responses.input_items.list(response.id, limit=2, order="asc")
    ]
    assert texts == ["0", "1", "2", "3", "4"]
    wrong = await running.http.get(f"/v1/responses/{response.id}/input_items", params={"limit": 0})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "limit")


async def test_store_false_keeps_nothing_and_delete_forgets(running):
    unstored = await running.openai.responses.create(model="pydoc-mini", input="hi", store=False)
    stored = await running.openai.responses.create(model="pydoc-mini", input="hi")
    assert (unstored.store, stored.store) == (False, True)
    await running.openai.responses.delete(stored.id)
    for response_id in (unstored.id, stored.id):
        with pytest.raises(openai.NotFoundError):
            await running.openai.responses.retrieve(response_id)
    with pytest.raises(openai.NotFoundError) as caught:
        await running.openai.responses.create(model="pydoc-mini", input="hi", previous_response_id=stored.id)
    assert caught.value.param == "previous_response_id"


async def test_a_position_without_a_stream_is_refused(running):
    response = await running.openai.responses.create(model="pydoc-mini", input="hi")
    reply = await running.http.get(f"/v1/responses/{response.id}?starting_after=1")
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "starting_after")


@pytest.mark.parametrize("at", ["where it runs", "elsewhere"])
async def test_a_running_response_that_was_deleted_never_comes_back(start_gateway, at):
    async with start_gateway() as one, start_gateway(background_alive_s=0.4) as other:
        other.worker.script.hold = one.worker.script.hold = True
        response = await other.openai.responses.create(model="pydoc-mini", input="hi", background=True)
        await other.worker.wait_for(lambda: one.worker.submits or other.worker.submits)
        deleting = other if at == "where it runs" else one
        await deleting.openai.responses.delete(response.id)
        async with asyncio.timeout(20):
            while other.gateway.background._runs:
                with pytest.raises(openai.NotFoundError):
                    await deleting.openai.responses.retrieve(response.id)
                await asyncio.sleep(0.02)
        for running in (one, other):
            with pytest.raises(openai.NotFoundError):
                await running.openai.responses.retrieve(response.id)
        for kind in ("response", "response-events", "response-alive"):
            assert await other.gateway.responses._objects.get(kind, response.id) is None


async def test_a_limit_makes_it_incomplete(running, text_ids):
    running.worker.script.token_ids = text_ids("one two three four")
    response = await running.openai.responses.create(model="pydoc-mini", input="hi", max_output_tokens=2)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"


async def test_logprobs_come_when_included(running, text_ids):
    running.worker.script.token_ids = text_ids("Yes.")
    response = await running.openai.responses.create(
        model="pydoc-mini", input="hi", include=["message.output_text.logprobs"], top_logprobs=2
    )
    entries = response.output[0].content[0].logprobs
    assert "".join(entry.token for entry in entries) == "Yes."
    assert [len(entry.top_logprobs) for entry in entries] == [2] * len(entries)


async def test_a_background_response_goes_on_without_its_client(running, text_ids):
    running.worker.script.token_ids = text_ids("done in the background")
    running.worker.script.step_s = 0.02
    queued = await running.openai.responses.create(model="pydoc-mini", input="hi", background=True)
    assert queued.status == "queued"
    assert queued.output == []
    done = await until(lambda: running.openai.responses.retrieve(queued.id), "completed")
    assert done.output_text == "done in the background"
    assert done.background is True


async def test_background_events_are_read_by_who_comes_later(running, text_ids):
    running.worker.script.token_ids = text_ids("one two three four five six")
    running.worker.script.step_s = 0.03
    stream = await running.openai.responses.create(model="pydoc-mini", input="hi", background=True, stream=True)
    seen = []
    async for event in stream:
        seen.append(event)
        if event.type == "response.output_text.delta":
            await stream.close()
            break
    resumed = await running.openai.responses.retrieve(
        seen[0].response.id, stream=True, starting_after=seen[-1].sequence_number
    )
    seen += [event async for event in resumed]
    assert all(after.sequence_number == before.sequence_number + 1 for before, after in pairwise(seen))
    assert seen[1].type == "response.queued"
    assert seen[-1].response.output_text == "one two three four five six"

    async def ask():
        return await running.openai.responses.retrieve(seen[0].response.id, stream=True)

    async with asyncio.timeout(30):
        while len(replayed := [event async for event in await ask()]) != len(seen):
            await asyncio.sleep(0.02)
    assert [event.type for event in replayed] == [event.type for event in seen]


async def test_cancelling_ends_a_background_response_and_its_session(running):
    running.worker.script.hold = True
    queued = await running.openai.responses.create(model="pydoc-mini", input="hi", background=True)
    await running.worker.wait_for(lambda: running.worker.submits)
    cancelled = await running.openai.responses.cancel(queued.id)
    assert cancelled.status == "cancelled"
    await running.worker.wait_for(lambda: running.worker.aborts)
    assert (await running.openai.responses.retrieve(queued.id)).status == "cancelled"
    assert running.open_sessions == 0


async def test_a_foreground_response_ends_with_its_client(running, text_ids):
    running.worker.script.token_ids = text_ids("one two three four five six") * 5
    running.worker.script.step_s = 0.05
    stream = await running.openai.responses.create(model="pydoc-mini", input="hi", stream=True)
    response_id = (await anext(aiter(stream))).response.id
    await stream.close()
    await running.worker.wait_for(lambda: running.worker.aborts)
    kept = await until(lambda: running.openai.responses.retrieve(response_id), "cancelled")
    assert kept.output[0].status == "incomplete"


async def test_a_failure_is_a_status_before_and_an_event_after_the_first_token(running, text_ids):
    running.worker.script.failure = CapacityExceeded("too big")
    with pytest.raises(openai.BadRequestError, match="too big"):
        await running.openai.responses.create(model="pydoc-mini", input="hi", stream=True)
    queued = await running.openai.responses.create(model="pydoc-mini", input="hi", background=True)
    failed = await until(lambda: running.openai.responses.retrieve(queued.id), "failed")
    assert "too big" in failed.error.message
    running.worker.script.failure = None
    running.worker.script.token_ids = text_ids("one two three four five")
    running.worker.script.die_after = 2
    stream = await running.openai.responses.create(model="pydoc-mini", input="hi", stream=True)
    last = [event async for event in stream][-1]
    assert last.type == "response.failed"
    assert "worker_lost" in last.response.error.message


async def test_a_gateway_that_stops_leaves_no_response_in_progress(start_gateway):
    async with start_gateway(background_alive_s=0.4) as first:
        first.worker.script.hold = True
        stopped = await first.openai.responses.create(model="pydoc-mini", input="hi", background=True)
        lost = await first.openai.responses.create(model="pydoc-mini", input="hi", background=True)
        await first.worker.wait_for(lambda: len(first.worker.submits) == 2)
        # The second one's gateway dies: nobody renews it, and nothing is written any more.
        run = first.gateway.background._runs.pop(lost.id)
        next(t for t in first.gateway.background._keepers if t.get_coro().cr_frame.f_locals["run"] is run).cancel()
        await until(lambda: first.openai.responses.retrieve(lost.id), "failed")
        run.cancel()
    async with start_gateway() as second:
        response = await second.openai.responses.retrieve(stopped.id)
        assert response.status == "failed"
        assert "stopped before" in response.error.message


async def test_a_response_of_another_gateway_can_be_cancelled(start_gateway):
    async with start_gateway(background_alive_s=3.0) as first:  # the second one starts on the same event loop
        first.worker.script.hold = True
        queued = await first.openai.responses.create(model="pydoc-mini", input="hi", background=True)
        async with start_gateway() as second:
            assert (await second.openai.responses.cancel(queued.id)).status == "cancelled"
        await until(lambda: first.openai.responses.retrieve(queued.id), "cancelled")
        await first.worker.wait_for(lambda: first.worker.aborts)


async def test_without_redis_a_stateless_response_still_comes(start_gateway, text_ids, redis_server):
    async with start_gateway(redis_url=redis_server.url) as running:
        running.worker.script.token_ids = text_ids("Still here.")
        redis_server.stop()
        response = await running.openai.responses.create(model="pydoc-mini", input="hi")
        assert (response.output_text, response.store) == ("Still here.", False)
        for ask in (
            running.openai.responses.retrieve(response.id),
            running.openai.responses.create(model="pydoc-mini", input="hi", previous_response_id=response.id),
            running.openai.responses.create(model="pydoc-mini", input="hi", background=True),
        ):
            with pytest.raises(openai.InternalServerError, match="Redis") as caught:
                await ask
            assert caught.value.status_code == 503


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "a"}]}, "input[0].output"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0]"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"metadata": {str(i): "v" for i in range(17)}}, "metadata"),
        ({"background": True, "store": False}, "store"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ({"text": {"format": {"type": "json_schema", "name": "s", "schema": {"not": {}}}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"bananas": 1}, "bananas"),
        ({"top_k": -5}, "top_k"),
        ({"request_id": "mine"}, "request_id"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"input": "a " * 1200, "store": False}, "input"),
        ({"input": "hi", "max_output_tokens": 5000}, "input"),
        ({"tools": [{"type": "custom", "name": "c"}]}, "tools[0].type"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom", "name": "c"}}, "tool_choice.type"),
        ({"input": "x" * 2000}, "input"),
    ],
)
async def test_refusals_name_the_field(start_gateway, change, param):
    async with start_gateway(max_stored_bytes=1024) as running:
        body = {"model": "pydoc-mini", "input": "hi", **change}
        reply = await running.http.post("/v1/responses", json=body)
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == param
        assert not running.worker.submits


async def test_vllms_extras_reach_the_worker_as_a_chats_do(running):
    extras = {
        "top_k": 5,
        "min_p": 0.1,
        "seed": 7,
        "stop": ["###"],
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "repetition_penalty": 1.5,
        "logit_bias": {"300": 2.0},
        "ignore_eos": False,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "structured_outputs": {"regex": "[a-z]+"},
        "cache_salt": "s",
        "priority": 3,
    }
    assert set(extras) == set(EXTRAS)
    await running.openai.responses.create(model="pydoc-mini", input="hi", extra_body=extras)
    turns = [{"role": "user", "content": "hi"}]
    await running.openai.chat.completions.create(model="pydoc-mini", messages=turns, extra_body=extras)
    response, chat = running.worker.submits
    assert response.sampling == chat.sampling
    assert (response.sampling.top_k, response.sampling.seed, response.cache_salt) == (5, 7, "s")
    assert response.priority == chat.priority


async def test_counting_tokens_equals_what_generation_submits(running):
    counted = await running.openai.responses.input_tokens.count(model="pydoc-mini", input="hi", instructions="Brief.")
    await running.openai.responses.create(model="pydoc-mini", input="hi", instructions="Brief.")
    assert counted.input_tokens == len(unpack_tokens(running.worker.submits[0].prompt_tokens))


async def test_too_many_background_responses_are_refused(start_gateway):
    async with start_gateway(max_background_responses=1) as running:
        running.worker.script.hold = True
        await running.openai.responses.create(model="pydoc-mini", input="hi", background=True)
        with pytest.raises(openai.RateLimitError, match="at most 1"):
            await running.openai.responses.create(model="pydoc-mini", input="hi", background=True)


async def test_a_stored_response_is_found_by_its_tenant_only(start_gateway, tmp_path):
    store = FileKeys(tmp_path / "keys.json")
    headers = []
    for tenant in ("acme", "other"):
        key, record = mint(tenant)
        await store.put(record)
        headers.append({"authorization": f"Bearer {key}"})
    async with start_gateway(api_keys=str(tmp_path / "keys.json")) as running:
        body = {"model": "pydoc-mini", "input": "hi"}
        path = "/v1/responses/" + (await running.http.post("/v1/responses", json=body, headers=headers[0])).json()["id"]
        assert (await running.http.get(path, headers=headers[1])).status_code == 404
        assert (await running.http.delete(path, headers=headers[1])).status_code == 404
        assert (await running.http.get(path, headers=headers[0])).status_code == 200


async def test_a_call_is_an_item_streamed_or_not(running, text_ids):
    running.worker.script.token_ids = text_ids("Let me see. " + CALL)
    whole = await running.openai.responses.create(model="pydoc-mini", input="hi", tools=TOOLS)
    assert [item.type for item in whole.output] == ["message", "function_call"]
    call = whole.output[1]
    assert (call.name, call.status) == ("look_up", "completed")
    assert json.loads(call.arguments) == {"name": "json.dumps"}
    stream = await running.openai.responses.create(model="pydoc-mini", input="hi", tools=TOOLS, stream=True)
    events = [event async for event in stream]
    kinds = [event.type for event in events if not event.type.endswith(".delta")]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    arguments = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(arguments) == events[-1].response.output[1].arguments == call.arguments


async def test_a_calls_result_makes_the_prompt_that_chat_makes_of_it(running, text_ids):
    running.worker.script.token_ids = text_ids("Let me see. " + CALL)
    first = await running.openai.responses.create(model="pydoc-mini", input="hi", tools=TOOLS)
    call = first.output[1]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "It serializes."}
    await running.openai.responses.create(
        model="pydoc-mini", input=[result], previous_response_id=first.id, tools=TOOLS
    )
    function = {"name": "look_up", "arguments": call.arguments}
    await running.openai.chat.completions.create(
        model="pydoc-mini",
        tools=[
            {
                "type": "function",
                "function": {"name": "look_up", "description": "Finds", "parameters": PARAMETERS},
            }
        ],
        messages=[
            {"role": "user", "content": "hi"},
            {
                "role": "assistant",
                "content": first.output_text,
                "tool_calls": [{"id": call.call_id, "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": call.call_id, "content": "It serializes."},
        ],
    )
    assert running.worker.submits[1].prompt_tokens == running.worker.submits[2].prompt_tokens


def test_reasoning_is_an_item_of_its_own_and_comes_back_with_its_turn():
    told = []
    items = OutputItems(lambda kind, **fields: told.append(kind), None, ToolFamily.HERMES, has_logprobs=False)
    items.add(Delta(0, reasoning="First "))
    items.add(Delta(0, reasoning="this.", text="Then that."))
    items.close("completed")
    assert [item["type"] for item in items.items] == ["reasoning", "message"]
    assert told.count("response.reasoning_text.delta") == 2
    assert chat_turns(items.items) == [
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "Then that."}],
            "reasoning_content": "First this.",
        }
    ]
