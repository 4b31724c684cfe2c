"""Anthropic's own client in front of the gateway, a scripted worker behind."""

from __future__ import annotations

from pathlib import Path

import anthropic
import httpx2
import pytest

from services.gateway.served_model import load_model
from services.gateway.settings import GatewaySettings
from shared.errors import CapacityExceeded, WorkerLost
from shared.identity import unpack_tokens

MODEL_DIR = Path("shared/assets/pydoc-mini")

TURNS = [{"role": "user", "content": "What does json.dumps do?"}]
ARGUMENTS = {"model": "pydoc-mini", "max_tokens": 50, "messages": TURNS}


@pytest.fixture
async def client(running):
    async with httpx2.AsyncClient(timeout=20, verify=False) as http:
        yield anthropic.AsyncAnthropic(base_url=running.url, api_key="none", max_retries=0, http_client=http)


async def test_a_message_has_the_workers_text_and_the_tokens_it_cost(running, client, text_ids):
    running.worker.script.token_ids = text_ids("Serialize an object.")
    message = await client.messages.create(**ARGUMENTS)
    assert [(block.type, block.text) for block in message.content] == [("text", "Serialize an object.")]
    assert (message.role, message.stop_reason, message.stop_sequence) == ("assistant", "end_turn", None)
    [submit] = running.worker.submits
    assert message.usage.input_tokens + message.usage.cache_read_input_tokens == len(
        unpack_tokens(submit.prompt_tokens)
    )
    assert message.usage.cache_read_input_tokens == 16
    assert message.usage.output_tokens == len(running.worker.script.token_ids) + 1
    assert message.id.startswith("msg_")
    assert message._request_id.startswith("req_")


async def test_a_stream_adds_up_to_the_whole_message(running, client, text_ids):
    running.worker.script.token_ids = text_ids("Grüße, 世界 🎉! Serialize.")
    whole = await client.messages.create(**ARGUMENTS)
    kinds = []
    async with client.messages.stream(**ARGUMENTS) as stream:
        async for event in stream:
            kinds.append(event.type)
        final = await stream.get_final_message()
    assert final.content[0].text == whole.content[0].text == "Grüße, 世界 🎉! Serialize."
    assert final.usage == whole.usage
    assert (final.stop_reason, final.model) == ("end_turn", "pydoc-mini")
    assert [kind for kind in kinds if kind != "ping"][:2] == ["message_start", "content_block_start"]
    assert kinds[-1] == "message_stop"


async def test_raw_events_come_in_anthropics_order(running, client, text_ids):
    running.worker.script.token_ids = text_ids("ok")
    events = [event async for event in await client.messages.create(**ARGUMENTS, stream=True)]
    kinds = [event.type for event in events if event.type not in ("content_block_delta", "ping")]
    assert kinds == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]
    raw = await running.http.post("/v1/messages", json={**ARGUMENTS, "stream": True})
    assert "event: ping\n" in raw.text
    assert "[DONE]" not in raw.text


async def test_the_prompt_is_the_chat_that_says_the_same(running, client):
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    await client.messages.create(
        model="pydoc-mini",
        max_tokens=5,
        system=system,
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "One"}]},
            {"role": "user", "content": "Two"},
            {"role": "assistant", "content": "Yes"},
            {"role": "user", "content": "Three"},
        ],
    )
    await running.openai.chat.completions.create(
        model="pydoc-mini",
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "One\nTwo"},
            {"role": "assistant", "content": "Yes"},
            {"role": "user", "content": "Three"},
        ],
    )
    first, second = running.worker.submits
    assert first.prompt_tokens == second.prompt_tokens
    assert first.sampling.max_tokens == 5


async def test_limits_and_stop_sequences_are_told_apart(running, client, text_ids):
    running.worker.script.token_ids = text_ids("one two three four")
    short = await client.messages.create(**{**ARGUMENTS, "max_tokens": 2})
    assert short.stop_reason == "max_tokens"
    stopped = await client.messages.create(**ARGUMENTS, stop_sequences=["three"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "three")
    assert stopped.content[0].text == "one two "


async def test_counting_tokens_equals_what_generation_submits(running, client):
    counted = await client.messages.count_tokens(model="pydoc-mini", messages=TURNS, system="Be brief.")
    await client.messages.create(**ARGUMENTS, system="Be brief.")
    assert counted.input_tokens == len(unpack_tokens(running.worker.submits[0].prompt_tokens))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tools": [{"name": "not a name", "input_schema": {}}]}, "name"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "'thinking' is not supported"),
        ({"stop_sequences": [""]}, "stop string"),
        ({"thinking": {"type": "maybe"}}, "thinking"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "text only"),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "server tool"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "f"}]}]}, "tool block"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"bananas": 1}, "bananas"),
        ({"output_config": {"effort": "low"}}, "'output_config.effort' is not supported"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "output_config.format"),
        ({"output_config": {"bananas": 1}}, "'output_config.bananas'"),
        ({"max_tokens": 5000}, "context length"),
    ],
)
async def test_refusals_say_why_in_anthropics_shape(client, change, told):
    arguments = ARGUMENTS | change
    known = {name: arguments.pop(name) for name in ("model", "max_tokens", "messages")}
    with pytest.raises(anthropic.BadRequestError, match=told) as caught:
        await client.messages.create(**known, extra_body=arguments)
    assert caught.value.body["type"] == "error"
    assert caught.value.body["error"]["type"] == "invalid_request_error"


async def test_output_of_a_schema_is_what_chats_response_format_is(running, client):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    wanted = {"type": "json_schema", "schema": schema}
    await client.messages.create(**ARGUMENTS, extra_body={"output_config": {"format": wanted, "effort": "high"}})
    await client.messages.create(**ARGUMENTS, extra_body={"output_format": wanted, "cache_salt": "s", "priority": 2})
    chat = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    await running.openai.chat.completions.create(model="pydoc-mini", messages=TURNS, response_format=chat)
    grammars = {submit.sampling.grammar for submit in running.worker.submits}
    assert len(grammars) == 1
    assert grammars != {""}
    assert running.worker.submits[1].cache_salt == "s"
    assert running.worker.submits[1].priority == 2


async def test_an_unknown_model_is_not_found(client):
    with pytest.raises(anthropic.NotFoundError) as caught:
        await client.messages.create(**{**ARGUMENTS, "model": "nope"})
    assert caught.value.body["error"]["type"] == "not_found_error"


async def test_a_workers_refusal_is_a_status_and_a_late_loss_an_error_event(running, client, text_ids):
    running.worker.script.failure = CapacityExceeded("too big")
    with pytest.raises(anthropic.BadRequestError, match="too big"):
        await client.messages.create(**ARGUMENTS, stream=True)
    running.worker.script.failure = None
    running.worker.script.token_ids = text_ids("one two three four five")
    running.worker.script.die_after = 2
    with pytest.raises(anthropic.APIStatusError) as caught:
        async for _ in await client.messages.create(**ARGUMENTS, stream=True):
            pass
    assert WorkerLost.http_status == 503
    assert caught.value.body["error"]["type"] == "overloaded_error"


CALL = '<tool_call>\n{"name": "look_up", "arguments": {"name": "json.dumps"}}\n</tool_call>'
TOOLS = [
    {
        "name": "look_up",
        "description": "Finds a function",
        "input_schema": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    }
]


@pytest.fixture
async def calling(start_gateway, text_ids):
    """A gateway of a model that calls tools, whose worker makes a call; and its client."""
    model = load_model(GatewaySettings(model=str(MODEL_DIR), tool_parser="hermes"), created=1)
    async with start_gateway(model_override=model) as running, httpx2.AsyncClient(timeout=20, verify=False) as http:
        running.worker.script.token_ids = text_ids("Let me see. " + CALL)
        yield (
            running,
            anthropic.AsyncAnthropic(base_url=running.url, api_key="none", max_retries=0, http_client=http),
        )


async def test_a_call_is_a_block_streamed_or_not(calling):
    _, client = calling
    whole = await client.messages.create(**ARGUMENTS, tools=TOOLS)
    assert [block.type for block in whole.content] == ["text", "tool_use"]
    assert (whole.content[1].name, whole.content[1].input) == ("look_up", {"name": "json.dumps"})
    assert whole.stop_reason == "tool_use"
    async with client.messages.stream(**ARGUMENTS, tools=TOOLS) as stream:
        final = await stream.get_final_message()
    assert [block.type for block in final.content] == ["text", "tool_use"]
    assert final.content[1].input == {"name": "json.dumps"}
    assert final.content[0].text == whole.content[0].text
    assert (final.stop_reason, final.usage) == ("tool_use", whole.usage)


async def test_calls_and_results_make_the_prompt_that_chat_makes_of_them(calling):
    running, client = calling
    whole = await client.messages.create(**ARGUMENTS, tools=TOOLS)
    call = whole.content[1]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "It serializes."}]}
    said = [block.model_dump(exclude_none=True) for block in whole.content]
    turns = [*TURNS, {"role": "assistant", "content": said}, {"role": "user", "content": [result]}]
    await client.messages.create(model="pydoc-mini", max_tokens=50, messages=turns, tools=TOOLS)
    function = {"name": "look_up", "arguments": '{"name": "json.dumps"}'}
    await running.openai.chat.completions.create(
        model="pydoc-mini",
        tools=[
            {
                "type": "function",
                "function": {
                    "name": "look_up",
                    "description": "Finds a function",
                    "parameters": TOOLS[0]["input_schema"],
                },
            }
        ],
        messages=[
            *TURNS,
            {
                "role": "assistant",
                "content": whole.content[0].text,
                "tool_calls": [{"id": call.id, "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": call.id, "content": "It serializes."},
        ],
    )
    assert running.worker.submits[1].prompt_tokens == running.worker.submits[2].prompt_tokens


async def test_the_assistants_turn_can_be_begun_for_it(running, client, model_files):
    turns = [*TURNS, {"role": "assistant", "content": "It turns an"}]
    await client.messages.create(model="pydoc-mini", max_tokens=5, messages=turns)
    assert model_files.decode(unpack_tokens(running.worker.submits[0].prompt_tokens)).endswith("It turns an")
