"""Tools, reasoning and structure over HTTP, with a worker whose tokens are scripted."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import openai
import pytest

from services.gateway.served_model import load_model
from services.gateway.settings import GatewaySettings
from services.gateway.syntax.families import ReasoningMarks
from shared.identity import unpack_tokens

MODEL = "pydoc-mini"
MODEL_DIR = Path("shared/assets/pydoc-mini")
USER = [{"role": "user", "content": "weather?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Says it", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "ping"}},
]
CALL = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


async def ask(running, **fields):
    return await running.openai.chat.completions.create(model=MODEL, messages=USER, **fields)


async def test_calls_come_whole(running, text_ids):
    running.worker.script.token_ids = text_ids(CALL)
    choice = (await ask(running, tools=TOOLS)).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
    (call,) = choice.message.tool_calls
    assert call.id.startswith("call_")
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Rome"})


async def test_calls_come_in_pieces_that_make_the_whole(running, text_ids):
    running.worker.script.token_ids = text_ids(CALL)
    stream = await ask(running, tools=TOOLS, stream=True)
    deltas = [chunk.choices[0].delta async for chunk in stream]
    pieces = [piece for delta in deltas for piece in delta.tool_calls or []]
    assert "".join(delta.content or "" for delta in deltas) == "Let me see."
    assert pieces[0].id
    assert pieces[0].function.name == "weather"
    assert len(pieces) > 2
    assert json.loads("".join(piece.function.arguments for piece in pieces)) == {"city": "Rome"}


async def test_tools_and_their_results_reach_the_prompt(running, model_files):
    assistant = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "ping", "arguments": '{"a": 1}'}}],
    }
    messages = [*USER, assistant, {"role": "tool", "tool_call_id": "c1", "content": "pong"}]
    await running.openai.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS)
    prompt = model_files.decode(unpack_tokens(running.worker.submits[-1].prompt_tokens))
    for part in ('"name": "weather"', '{"name": "ping", "arguments": {"a": 1}}', "tool\npong"):
        assert part in prompt


async def test_no_call_is_read_where_none_may_be_made(running, text_ids):
    running.worker.script.token_ids = text_ids(CALL)
    message = (await ask(running, tools=TOOLS, tool_choice="none")).choices[0].message
    assert (message.content, message.tool_calls) == (CALL, None)


@pytest.mark.parametrize(
    ("fields", "has_grammar", "names"),
    [
        ({}, False, ()),
        ({"tool_choice": "required"}, True, ("weather", "ping")),
        ({"tool_choice": {"type": "function", "function": {"name": "ping"}}}, True, ("ping",)),
        ({"response_format": {"type": "json_object"}}, True, ("weather", "ping", "structure")),
    ],
    ids=["auto", "required", "named", "or-json"],
)
async def test_worker_gets_the_grammar_that_the_choice_asks_for(running, fields, has_grammar, names):
    await ask(running, tools=TOOLS, **fields)
    grammar = running.worker.submits[-1].sampling.grammar
    assert bool(grammar) == has_grammar
    assert all(name in grammar for name in names)
    assert "weather" not in grammar or "weather" in names


async def test_named_call_ends_with_stop(running, text_ids):
    running.worker.script.token_ids = text_ids('<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>')
    reply = await ask(running, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "ping"}})
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].message.tool_calls[0].function.name == "ping"


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"tool_choice": "required"}, "tool_choice", "needs 'tools'"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "'x'"),
        ({"tools": [TOOLS[1], TOOLS[1]]}, "tools", "one name"),
        ({"tools": TOOLS * 65}, "tools", "130 tools, at most 128"),
        ({"functions": [{"name": "f"}]}, "functions", "tools"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"not": {}}}}},
         "response_format", '"not"'),
        ({"guided_regex": "a" * 5000}, "guided_regex", "5000 characters; it must have 1 to 4096"),
        ({"guided_regex": "(a"}, "guided_regex", "regex"),
        ({"guided_choice": ["a"], "guided_regex": "b"}, "guided_choice", "only one of"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"guided_grammar": "start: nowhere"}, "guided_grammar", "nowhere"),
        ({"guided_json": {"enum": ["x" * 140_000]}}, "guided_json", "at most 131072"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "end of a structured output"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "marks no reasoning"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs.enable_thinking", "does not read"),
        ({"chat_template": "x"}, "chat_template", "operator"),
        ({"tools": [{"type": "custom", "custom": {"name": "c"}}]}, "tools[0].type", "custom tools"),
        ({"tools": [*TOOLS, {"type": "retrieval"}]}, "tools[2].type", "'function'"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom", "custom": {"name": "c"}}}, "tool_choice.type",
         "custom tools"),
    ],
    ids=str,
)  # fmt: skip
async def test_what_cannot_be_kept_to_is_refused_at_once(running, fields, param, said):
    response = await running.http.post("/v1/chat/completions", json={"model": MODEL, "messages": USER, **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert said in error["message"]
    assert not running.worker.submits


async def test_deep_schema_is_refused_with_both_numbers(running):
    schema: dict = {"type": "string"}
    for _ in range(40):
        schema = {"type": "array", "items": schema}
        schema = {"anyOf": [schema]}
    with pytest.raises(openai.BadRequestError, match=r"levels deep, at most 64"):
        await ask(running, extra_body={"guided_json": schema})


@pytest.fixture
async def thinking(start_gateway, tmp_path):
    """A gateway whose template knows of reasoning and opens it on demand."""
    template = tmp_path / "template.jinja"
    template.write_text(
        "{%- for message in messages -%}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{%- endfor -%}<|im_start|>assistant\n"
        "{%- if enable_thinking is defined and not enable_thinking -%}<think>\n\n</think>\n\n"
        "{%- elif open -%}<think>\n{%- endif -%}"
    )
    settings = GatewaySettings(model=str(MODEL_DIR), chat_template=template)
    async with start_gateway(model_override=load_model(settings, created=1)) as gateway:
        assert gateway.gateway.model.syntax.reasoning == ReasoningMarks("<think>", "</think>")
        yield gateway


async def test_reasoning_comes_apart_whole_and_streamed(thinking, text_ids):
    thinking.worker.script.token_ids = text_ids("<think>\nhm\n</think>\n\nYes.")
    reply = await ask(thinking)
    message = reply.choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == ("Yes.", "hm", "hm")
    deltas = [chunk.choices[0].delta async for chunk in await ask(thinking, stream=True)]
    for name in ("reasoning_content", "reasoning"):
        assert "".join(getattr(delta, name, None) or "" for delta in deltas) == "hm"
    assert "".join(delta.content or "" for delta in deltas) == "Yes."


async def test_reasoning_of_earlier_turns_has_two_names(thinking):
    for name in ("reasoning", "reasoning_content"):
        turns = [*USER, {"role": "assistant", "content": "Yes.", name: "hm"}, *USER]
        await thinking.openai.chat.completions.create(model=MODEL, messages=turns)
    first, second = thinking.worker.submits
    assert first.prompt_tokens == second.prompt_tokens


async def test_a_response_tells_reasoning_tokens(start_gateway, tmp_path, text_ids):
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}<think></think><think>")
    settings = GatewaySettings(model=str(MODEL_DIR), chat_template=template)
    async with start_gateway(model_override=load_model(settings, created=1)) as running:
        running.worker.script.token_ids = text_ids("hm</think>Yes.")
        response = await running.openai.responses.create(model=MODEL, input="hi")
        assert response.output_text == "Yes."
        assert response.usage.output_tokens_details.reasoning_tokens == len(text_ids("hm</think>"))


async def test_prompt_that_opens_reasoning_is_noticed(thinking, text_ids):
    thinking.worker.script.token_ids = text_ids("hm</think>Yes.")
    extra = {"chat_template_kwargs": {"open": True}, "thinking_token_budget": 7}
    reply = await ask(thinking, extra_body=extra)
    assert reply.choices[0].message.reasoning_content == "hm"
    assert reply.usage.completion_tokens_details.reasoning_tokens == len(text_ids("hm</think>"))
    told = thinking.worker.submits[-1].sampling.thinking
    assert (told.is_open, told.max_tokens, list(told.end_ids)) == (True, 7, text_ids("</think>"))


async def test_effort_none_closes_reasoning_in_the_template(thinking, model_files):
    await ask(thinking, reasoning_effort="none")
    assert "</think>" in model_files.decode(unpack_tokens(thinking.worker.submits[-1].prompt_tokens))


async def test_last_message_can_be_continued(running, model_files):
    messages = [*USER, {"role": "assistant", "content": "It is"}]
    await running.openai.chat.completions.create(
        model=MODEL, messages=messages, extra_body={"continue_final_message": True}
    )
    assert model_files.decode(unpack_tokens(running.worker.submits[-1].prompt_tokens)).endswith("assistant\nIt is")


async def test_schema_that_compiles_forever_is_refused_while_others_are_served(start_gateway):
    slow = {"type": "integer", "multipleOf": 99_991}  # about a second alone on a core
    async with start_gateway(grammar_timeout_s=0.1) as gateway:
        body = {"model": MODEL, "prompt": "x", "guided_json": slow}
        hostile = asyncio.create_task(gateway.http.post("/v1/completions", json=body))
        await asyncio.sleep(0)
        other = await gateway.http.post("/v1/completions", json={"model": MODEL, "prompt": "x"})
        assert other.status_code == 200
        refused = await hostile
        assert refused.status_code == 400
        assert "not compiled within 0.1 s" in refused.json()["error"]["message"]


async def test_template_that_renders_forever_is_given_up(start_gateway, tmp_path):
    template = tmp_path / "slow.jinja"
    template.write_text("{%- for i in range(n) -%}{%- for j in range(n) -%}x{%- endfor -%}{%- endfor -%}")
    settings = GatewaySettings(model=str(MODEL_DIR), chat_template=template)
    model = load_model(settings, created=1)
    async with start_gateway(model_override=model, template_timeout_s=0.05) as gateway:
        with pytest.raises(openai.BadRequestError, match=r"took longer than 0\.05 s"):
            await ask(gateway, extra_body={"chat_template_kwargs": {"n": 2500}})
