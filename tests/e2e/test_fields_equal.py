"""Every field gives equal replies in aggregated and in disaggregated serving, also when workers die in the middle."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
import uuid

import httpx
import jsonschema
import pytest

from loadtest.fleet import Fleet
from services.gateway.schemas.chat import ChatBody
from services.gateway.schemas.completion import CompletionBody

MODEL = "pydoc-mini"
FILLER = "The report was read twice and filed. Nobody asked for a second copy. " * 6
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["a", "b"]},
    },
    "required": ["name", "count", "kind"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "ping"}},
]
FORMAT = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
NAMED = {"type": "function", "function": {"name": "f"}}


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


COMPLETIONS = {
    "json": {"guided_json": SCHEMA, "temperature": 1, "seed": 4, "n": 3, "logprobs": 2},
    "regex": {"structured_outputs": {"regex": "[a-f]{3}-[0-9]{2}"}, "temperature": 1, "seed": 1},
    "guided-regex": {"guided_regex": "[a-z ]{8,40}", "temperature": 1, "seed": 13},
    "choice": {"guided_choice": ["yes", "no", "maybe"], "temperature": 1, "seed": 2, "n": 4},
    "grammar": {"guided_grammar": 'root ::= "a" root | "b"', "temperature": 1, "seed": 5},
    "echo": {"echo": True, "logprobs": 2, "max_tokens": 0},
    "prompt-logprobs": {"prompt_logprobs": 3, "n": 2, "max_tokens": 4, "temperature": 0},
    "best-of": {"best_of": 4, "n": 2, "temperature": 1, "seed": 6, "max_tokens": 12},
    "allowed": {"allowed_token_ids": [300, 301, 302], "temperature": 1, "seed": 7, "max_tokens": 8},
    "bad-words": {"bad_words": ["the", "is"], "temperature": 0, "max_tokens": 24},
    "stop": {"stop": ["the"], "include_stop_str_in_output": True, "temperature": 0, "max_tokens": 40},
    "token-ids": {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": 1, "max_tokens": 6},
    "truncated": {"truncate_prompt_tokens": 40, "temperature": 0, "max_tokens": 8},
    "special": {"skip_special_tokens": False, "temperature": 0, "max_tokens": 40},
    "sampling": {"temperature": 0.9, "seed": 8, "top_p": 0.9, "top_k": 40, "min_p": 0.02, "n": 2, "logprobs": 1},
    "penalties": {"temperature": 0.8, "seed": 9, "presence_penalty": 0.7, "frequency_penalty": 0.3,
                  "repetition_penalty": 1.1, "ignore_eos": True},
    "bias": {"temperature": 0, "logit_bias": {"300": 5.0, "310": -100}, "min_tokens": 20, "stop_token_ids": [300]},
    "batch": {"prompt": [FILLER, FILLER + "Again."], "temperature": 1, "seed": 10, "n": 2, "max_tokens": 32},
    "whitespace": {"guided_json": SCHEMA, "guided_whitespace_pattern": "[ ]?", "temperature": 1, "seed": 11},
    "object": {"response_format": {"type": "json_object"}, "temperature": 1, "seed": 12, "max_tokens": 60},
    "right": {"truncate_prompt_tokens": 40, "truncation_side": "right", "temperature": 0, "max_tokens": 24},
    "beams": {"use_beam_search": True, "n": 3, "max_tokens": 24, "length_penalty": 0.5, "logprobs": 0},
}  # fmt: skip
CHATS = {
    "response-format": {"response_format": FORMAT, "temperature": 1, "seed": 1, "n": 2},
    "required": {"tools": TOOLS, "tool_choice": "required", "temperature": 1, "seed": 2},
    "named": {"tools": TOOLS, "tool_choice": NAMED, "temperature": 1, "seed": 3},
    "one-call": {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "temperature": 1, "seed": 4},
    "scores": {"logprobs": True, "top_logprobs": 3, "temperature": 0, "max_completion_tokens": 40, "max_tokens": None},
    "begun": {"messages": [{"role": "user", "content": FILLER}, {"role": "assistant", "content": "It is"}],
              "continue_final_message": True, "add_generation_prompt": False, "temperature": 0},
    "offered": {"tools": TOOLS, "tool_choice": "auto", "temperature": 1, "seed": 5, "max_tokens": 60},
}  # fmt: skip
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


REQUESTS = {
    **{f"completion-{name}": ("/v1/completions", {"prompt": FILLER, **COMPLETIONS[name]}) for name in COMPLETIONS},
    **{
        f"chat-{name}": ("/v1/chat/completions", {"messages": [{"role": "user", "content": FILLER}], **CHATS[name]})
        for name in CHATS
    },
}
STREAMED = ["completion-json", "completion-penalties", "completion-stop", "chat-required", "chat-scores"]
SHORT = 12
ROUNDS = 8


async def ask(client: httpx.AsyncClient, url: str, path: str, fields: dict) -> tuple[dict, list[str]]:
    """The reply without what may differ, and why its sessions moved."""
    body = {"model": MODEL, "max_tokens": 160, "cache_salt": uuid.uuid4().hex, "timing": True, **fields}
    reply = await client.post(f"{url}{path}", json=body)
    assert reply.status_code == 200, reply.text
    content = reply.json()
    moves = [move for session in content["timing"]["sessions"] for move in session["migrations"]]
    return plain(content), moves


async def ask_streamed(client: httpx.AsyncClient, url: str, path: str, fields: dict) -> tuple[dict, list[str]]:
    """Likewise of a stream: the words, calls, scores and ends of every choice."""
    choices: dict[int, dict] = {}
    moves: list[str] = []
    body = {"model": MODEL, "max_tokens": 160, "cache_salt": uuid.uuid4().hex, "timing": True, "stream": True, **fields}
    async with client.stream("POST", f"{url}{path}", json=body) as stream:
        async for line in stream.aiter_lines():
            event = json.loads(line[6:]) if line.startswith("data: {") else {}
            assert "error" not in event, line
            moves += [
                move for session in (event.get("timing") or {}).get("sessions", ()) for move in session["migrations"]
            ]
            for choice in event.get("choices", ()):
                delta, logprobs = choice.get("delta", choice), choice.get("logprobs") or {}
                seen = choices.setdefault(choice["index"], {"text": "", "calls": "", "tokens": [], "finish": None})
                seen["text"] += delta.get("text") or delta.get("content") or ""
                for call in delta.get("tool_calls") or ():
                    seen["calls"] += call["function"].get("name", "") + call["function"].get("arguments", "")
                seen["tokens"] += logprobs.get("tokens") or [entry["token"] for entry in logprobs.get("content") or ()]
                seen["finish"] = choice["finish_reason"] or seen["finish"]
    return choices, moves


@pytest.fixture(scope="module")
def struck(suite) -> dict[str, tuple[dict, list[dict], bool]]:
    """Per request: the aggregated reply, those of rounds in which a worker died, and whether one of them had moved."""
    return asyncio.run(_strike(suite))


async def _strike(suite) -> dict[str, tuple[dict, list[dict], bool]]:
    requests = {name: (ask, *REQUESTS[name]) for name in REQUESTS}
    requests |= {f"stream-{name}": (ask_streamed, *REQUESTS[name]) for name in STREAMED}
    replies: dict[str, list[dict]] = {name: [] for name in requests}
    moved: set[str] = set()
    give_up_s = time.monotonic() + 75
    async with Fleet(suite.redis_url) as fleet, httpx.AsyncClient(timeout=60, limits=httpx.Limits()) as client:
        expected = {name: (await call(client, suite.local_url, *rest))[0] for name, (call, *rest) in requests.items()}
        for _ in range(ROUNDS):
            await fleet.until_ready(3)
            # Short ones are over before anything can happen to them, so more of them are asked.
            left = [name for name in requests if name not in moved]
            names = left * max(1, min(8, 48 // len(left)))
            tasks = [asyncio.create_task(requests[name][0](client, suite.url, *requests[name][1:])) for name in names]
            if victim := await _busiest(fleet, min(SHORT, len(names) // 3), tasks):
                os.kill(victim.pid, signal.SIGKILL)
            for name, (reply, moves) in zip(names, await asyncio.gather(*tasks), strict=True):
                replies[name].append(reply)
                if moves:
                    moved.add(name)
            if moved == set(requests) or time.monotonic() > give_up_s:
                break
        await fleet.until_ready(3)
        await fleet.until_free()
    return {name: (expected[name], replies[name], name in moved) for name in requests}


async def _busiest(fleet: Fleet, sequences: int, tasks: list[asyncio.Task]):
    """A decode worker as soon as it generates so many sequences, or as many as there will be; None if all is over."""
    deadline_s = time.monotonic() + 3
    while not all(task.done() for task in tasks):
        workers = [status for status in await fleet.statuses() if status.role == "decode" and status.running]
        busiest = max(workers, key=lambda status: status.running, default=None)
        if busiest and (busiest.running >= sequences or time.monotonic() > deadline_s):
            return busiest
        await asyncio.sleep(0.002)
    return None


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", [*REQUESTS, *(f"stream-{name}" for name in STREAMED)])
def test_fields_are_equal_when_a_worker_dies_in_the_middle(struck, name):
    expected, replies, _ = struck[name]
    assert replies
    assert all(reply == expected for reply in replies)


def test_nearly_every_field_was_really_struck(struck):
    """Those of a few tokens may slip through; the others may not."""
    spared = {name for name, (_, _, is_moved) in struck.items() if not is_moved}
    assert len(spared) <= len(struck) // 5, spared
