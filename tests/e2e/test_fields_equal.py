"""Every field gives equal replies in aggregated and in disaggregated serving."""

from __future__ import annotations

import json
import re
import uuid

import httpx
import jsonschema
import pytest

from services.gateway.schemas.chat import ChatBody
from services.gateway.schemas.completion import CompletionBody
from tests.e2e.field_values import CHATS, COMPLETIONS, FILLER, MODEL, NAMED, SCHEMA, TOOLS


def post(url: str, path: str, fields: dict) -> dict:
    body = {"model": MODEL, "max_tokens": 160, "cache_salt": uuid.uuid4().hex, "timing": True, **fields}
    reply = httpx.post(f"{url}{path}", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()


def plain(reply: dict) -> dict:
    """Without names, times and what a cache holds; numbers that sums in another order make differ, rounded."""
    text = json.dumps(
        {**reply, "timing": None, "id": "", "created": 0, "usage": {**reply["usage"], "prompt_tokens_details": 0}}
    )
    return json.loads(re.sub(r"call_[0-9a-f]+", "call", text), parse_float=lambda number: round(float(number), 2))


# Fields that have no output of their own to compare.
NAMES = {"model", "prompt", "messages", "user", "safety_identifier", "prompt_cache_key", "request_id", "cache_salt"}
WAYS = {"timing", "priority", "stream", "stream_options"}  # how a reply comes, not what it says
# The bundled model marks no reasoning, and its template reads neither documents nor arguments: refused in every mode.
NOT_OF_THIS_MODEL = {
    "reasoning_effort",
    "include_reasoning",
    "thinking_token_budget",
    "documents",
    "chat_template_kwargs",
}


@pytest.mark.parametrize("name", COMPLETIONS)
def test_completion_fields_are_equal(suite, name):
    fields = {"prompt": FILLER, **COMPLETIONS[name]}
    remote, local = (post(url, "/v1/completions", fields) for url in (suite.url, suite.local_url))
    assert plain(remote) == plain(local)
    assert local["timing"]["sessions"][0]["mode"] == "local"
    is_scored = name in ("echo", "prompt-logprobs")
    assert remote["timing"]["sessions"][0]["mode"] == ("local" if is_scored else "remote_prefill")
    for choice in remote["choices"]:
        _check_completion(name, choice)


def _check_completion(name: str, choice: dict) -> None:
    if name == "json":
        jsonschema.validate(json.loads(choice["text"]), SCHEMA)
        assert len(choice["logprobs"]["tokens"]) > 5
    elif name == "regex":
        assert re.fullmatch("[a-f]{3}-[0-9]{2}", choice["text"])
    elif name == "choice":
        assert choice["text"] in ("yes", "no", "maybe")
    elif name == "echo":
        assert choice["text"] == FILLER
        lists = choice["logprobs"]
        assert lists["token_logprobs"][0] is None
        assert all(logprob < 0 for logprob in lists["token_logprobs"][1:])
        assert "".join(lists["tokens"]) == FILLER
    elif name == "prompt-logprobs":
        assert choice["prompt_logprobs"][0] is None
        assert all(3 <= len(entry) <= 4 for entry in choice["prompt_logprobs"][1:])
    elif name == "bad-words":
        assert not re.search(r"(^| )(the|is)( |$)", choice["text"])
    elif name == "token-ids":
        assert choice["logprobs"]["tokens"] == [f"token_id:{token_id}" for token_id in choice["token_ids"]]
    elif name == "truncated":
        assert choice["finish_reason"] in ("length", "stop")


@pytest.mark.parametrize("name", CHATS)
def test_chat_fields_are_equal(suite, name):
    fields = {"messages": [{"role": "user", "content": FILLER}], "max_tokens": 200, **CHATS[name]}
    remote, local = (post(url, "/v1/chat/completions", fields) for url in (suite.url, suite.local_url))
    assert plain(remote) == plain(local)
    for choice in remote["choices"]:
        message = choice["message"]
        if name == "response-format":
            jsonschema.validate(json.loads(message["content"]), SCHEMA)
        elif name in ("required", "named", "one-call"):
            for call in message["tool_calls"][: None if choice["finish_reason"] != "length" else -1]:
                arguments = json.loads(call["function"]["arguments"])
                if call["function"]["name"] == "f":
                    jsonschema.validate(arguments, SCHEMA)
        if name == "one-call":
            assert len(message["tool_calls"]) == 1


def test_scores_of_a_prompt_are_those_of_generating_it(suite):
    """The log-probability that a token had when it was generated is the one it has in a prompt."""
    fields = {"prompt": FILLER, "temperature": 0, "max_tokens": 12, "logprobs": 0, "return_token_ids": True}
    made = post(suite.url, "/v1/completions", fields)["choices"][0]
    tokens, generated = made["prompt_token_ids"] + made["token_ids"], made["logprobs"]["token_logprobs"]
    again = {"prompt": tokens, "max_tokens": 1, "prompt_logprobs": 0}
    scored = post(suite.url, "/v1/completions", again)["choices"][0]["prompt_logprobs"]
    told = [entry[str(token)]["logprob"] for entry, token in zip(scored[-12:], tokens[-12:], strict=True)]
    assert told[: len(generated)] == pytest.approx(generated, abs=2e-3)


def test_streamed_call_is_the_whole_one(suite):
    create = suite.client().chat.completions.create
    fields = {"tools": TOOLS, "tool_choice": NAMED, "seed": 9, "temperature": 1, "max_tokens": 200}
    messages = [{"role": "user", "content": "x"}]
    whole = create(model=MODEL, messages=messages, **fields).choices[0].message.tool_calls[0]
    stream = create(model=MODEL, messages=messages, stream=True, **fields)
    pieces = [piece for chunk in stream for piece in chunk.choices[0].delta.tool_calls or []]
    assert "".join(piece.function.arguments for piece in pieces) == whole.function.arguments
    assert pieces[0].function.name == "f"


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_beams_are_equal_and_scored_by_their_tokens(suite, chat):
    fields = {"use_beam_search": True, "n": 3, "max_tokens": 20, "length_penalty": 0.5, "return_token_ids": True}
    if chat:
        fields |= {"messages": [{"role": "user", "content": FILLER}], "logprobs": True}
    else:
        fields |= {"prompt": FILLER, "logprobs": 0}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    remote, local = (post(url, path, fields) for url in (suite.url, suite.local_url))
    assert plain(remote) == plain(local)
    assert remote["timing"]["sessions"][0]["mode"] == "remote_prefill"
    scores, outputs = [], set()
    for choice in remote["choices"]:
        logprobs = choice["logprobs"]
        values = [entry["logprob"] for entry in logprobs["content"]] if chat else logprobs["token_logprobs"]
        outputs.add(tuple(choice["token_ids"]))
        if choice["finish_reason"] == "length":
            scores.append(sum(values) / len(values) ** 0.5)
    assert len(outputs) == 3
    assert scores == sorted(scores, reverse=True)


def test_one_beam_of_a_prompt_is_its_greedy_output(suite):
    beam = post(suite.url, "/v1/completions", {"prompt": FILLER, "use_beam_search": True, "max_tokens": 1})
    greedy = post(suite.url, "/v1/completions", {"prompt": FILLER, "temperature": 0, "max_tokens": 1})
    assert beam["choices"][0]["text"] == greedy["choices"][0]["text"]


@pytest.mark.parametrize("fields", [{"n": 11}, {"temperature": 0.7}, {"stop": "x"}, {"guided_regex": "a"}], ids=str)
def test_what_beams_cannot_do_is_refused(suite, fields):
    body = {"model": MODEL, "prompt": "x", "max_tokens": 4, "use_beam_search": True, **fields}
    reply = httpx.post(f"{suite.url}/v1/completions", json=body, timeout=60)
    assert reply.status_code == 400
    assert "beam" in reply.json()["error"]["message"]


def test_every_field_is_in_the_tables():
    for body, table in ((CompletionBody, COMPLETIONS), (ChatBody, {**COMPLETIONS, **CHATS})):
        compared = {field for fields in table.values() for field in fields}
        assert set(body.model_fields) - compared - NAMES - WAYS - NOT_OF_THIS_MODEL == set()
