"""Every limit on a body: a request beyond it is refused at once, before any worker, with both numbers."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.services.gateway.test_gateway_errors import assert_openai_error

COMPLETION, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


def tool(name: str, parameters: dict | None = None) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": parameters or {"type": "object"}}}


def called(arguments: dict) -> dict:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": json.dumps(arguments)}}
    return {"role": "assistant", "tool_calls": [call]}


def as_format(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}


WIDE = {"type": "object", "properties": {f"property{i}": {"type": "string"} for i in range(40)}}
PARAMETERS, ARGUMENTS = "tools[0].function.parameters", "messages[0].tool_calls[0].function.arguments"
CASES = {
    "prompts": ({"max_choices": 4}, COMPLETION, {"prompt": ["x"] * 5}, "prompt", (5, 4)),
    "prompts-x-n": ({"max_choices": 4}, COMPLETION, {"prompt": ["x"] * 3, "n": 2}, "n", (6, 4)),
    "best-of": ({"max_choices": 4}, COMPLETION, {"best_of": 5}, "n", (5, 4)),
    "beams": ({}, COMPLETION, {"n": 11, "use_beam_search": True}, "n", (11, 10)),
    "stops": ({"max_stop_strings": 2}, CHAT, {"stop": ["a", "b", "c"]}, "stop", (3, 2)),
    "stop-length": ({"max_stop_chars": 8}, CHAT, {"stop": "123456789"}, "stop", (9, 8)),
    "schema-size": ({"max_schema_bytes": 512}, CHAT, {"response_format": as_format(WIDE)}, "response_format", (512,)),
    "schema-depth": ({"max_schema_depth": 8}, COMPLETION, {"guided_json": nested(9)}, "guided_json", (9, 8)),
    "schema-in-text": ({}, COMPLETION, {"guided_json": json.dumps(nested(400))}, "guided_json", (400, 64)),
    "body-depth": ({}, COMPLETION, {"guided_json": nested(400)}, None, (401, 200)),
    "regex": ({"max_regex_chars": 16}, COMPLETION, {"guided_regex": "a" * 17}, "guided_regex", (17, 16)),
    "grammar": ({"max_grammar_chars": 16}, COMPLETION, {"guided_grammar": "#" * 17}, "guided_grammar", (17, 16)),
    "choices": ({"max_grammar_chars": 16}, COMPLETION, {"guided_choice": ["a" * 9] * 2}, "guided_choice", (18, 16)),
    "tools": ({"max_tools": 2}, CHAT, {"tools": [tool(name) for name in "abc"]}, "tools", (3, 2)),
    "call-depth": ({}, CHAT, {"messages": [called(nested(400))]}, ARGUMENTS, (400, 200)),
    "tool-depth": ({"max_schema_depth": 8}, CHAT, {"tools": [tool("a", nested(9))]}, PARAMETERS, (9, 8)),
    "tool-much-deeper": ({}, CHAT, {"tools": [tool("a", nested(400))]}, None, (200,)),
    "tool-size": ({"max_schema_bytes": 512}, CHAT, {"tools": [tool("a", WIDE)]}, PARAMETERS, (512,)),
    "bad-words": ({}, COMPLETION, {"bad_words": ["a"] * 257}, "bad_words", (257, 256)),
    "bad-word-length": ({}, COMPLETION, {"bad_words": ["a" * 300]}, "bad_words", (300, 256)),
    "logprobs": ({}, COMPLETION, {"logprobs": 21}, "logprobs", (20,)),
    "inputs": ({"max_embedding_inputs": 2}, "/v1/embeddings", {"input": ["a"] * 3}, "input", (3, 2)),
    "salt": ({}, CHAT, {"cache_salt": "s" * 1025}, "cache_salt", (1024,)),
    "response-tools": (
        {"max_tools": 2},
        RESPONSES,
        {"tools": [{"type": "function", "name": name, "parameters": {}} for name in "abc"]},
        "tools",
        (3, 2),
    ),
    "response-schema": (
        {"max_schema_depth": 8},
        RESPONSES,
        {"text": {"format": {"type": "json_schema", "name": "s", "schema": nested(400)}}},
        None,
        (200,),
    ),
    "stored": ({"max_stored_bytes": 1024}, RESPONSES, {"input": "word " * 400}, "input", (1024,)),
    "message-tools": (
        {"max_tools": 2},
        "/v1/messages",
        {"max_tokens": 4, "tools": [{"name": name, "input_schema": {"type": "object"}} for name in "abc"]},
        None,
        (3, 2),
    ),
}  # fmt: skip
BASES = {
    COMPLETION: {"prompt": "x", "max_tokens": 4},
    CHAT: {"messages": [{"role": "user", "content": "x"}]},
    RESPONSES: {"input": "x"},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}]},
}


@pytest.mark.parametrize("name", CASES)
async def test_what_is_beyond_a_limit_is_refused_with_both_numbers(start_gateway, name):
    settings, path, fields, param, numbers = CASES[name]
    async with start_gateway(**settings) as running:
        reply = await running.http.post(path, json={"model": "pydoc-mini", **BASES.get(path, {}), **fields})
        assert reply.status_code == 400, reply.text
        error = reply.json()["error"]
        assert all(str(number) in error["message"] for number in numbers), error
        if param is not None:
            assert assert_openai_error(reply, 400, error["code"])["param"] == param
        assert not running.worker.submits
        assert running.open_sessions == 0


NEVER = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
ENDLESS = {
    "chat": (CHAT, {"response_format": as_format({"$ref": "#"})}, "response_format"),
    "completion": (COMPLETION, {"guided_json": NEVER}, "guided_json"),
    "tool": (CHAT, {"tools": [tool("f", NEVER)], "tool_choice": "required"}, PARAMETERS),
    "response": (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "s", "schema": NEVER}}}, "text.format"),
}


@pytest.mark.parametrize("name", ENDLESS)
async def test_a_schema_whose_values_never_end_is_refused_by_the_keyword(running, name):
    path, fields, param = ENDLESS[name]
    reply = await running.http.post(path, json={"model": "pydoc-mini", **BASES[path], **fields})
    error = assert_openai_error(reply, 400, "invalid_request")
    assert (error["param"], "'$ref' '#'" in error["message"]) == (param, True)
    assert not running.worker.submits


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (COMPLETION, {"prompt": ["short", "long " * 200_000]}, "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": "long " * 200_000}]}, "messages"),
        ("/v1/embeddings", {"input": ["short", "long " * 200_000]}, "input"),
    ],
)
async def test_a_text_that_can_never_fit_is_refused_before_it_is_tokenized(running, monkeypatch, path, fields, param):
    monkeypatch.setattr(type(running.gateway.pipeline), "tokenize", None)
    reply = await running.http.post(path, json={"model": "pydoc-mini", **fields})
    error = assert_openai_error(reply, 400, "context_length_exceeded")
    assert (error["param"], "at least" in error["message"], "1024" in error["message"]) == (param, True, True)


async def test_a_batch_with_a_line_that_is_too_deep_fails_and_says_which(start_gateway, tmp_path):
    line = {"custom_id": "a", "method": "POST", "url": COMPLETION, "body": {"guided_json": nested(400)}}
    async with start_gateway(files_dir=tmp_path / "files", batch_poll_s=0.05) as running:
        file = await running.openai.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
        batch = await running.openai.batches.create(input_file_id=file.id, endpoint=COMPLETION, completion_window="24h")
        async with asyncio.timeout(30):
            while (batch := await running.openai.batches.retrieve(batch.id)).status != "failed":
                await asyncio.sleep(0.03)
        assert "at most 200" in batch.errors.data[0].message
        assert batch.errors.data[0].line == 1
