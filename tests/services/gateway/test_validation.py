"""What a body may say, and how it is told when it may not."""

from __future__ import annotations

import orjson
import pytest

from services.gateway.requests.body_reader import parse_body
from services.gateway.requests.messages import template_messages
from services.gateway.requests.validation import chat_request, completion_request, output_limit
from services.gateway.schemas.chat import ChatBody
from services.gateway.schemas.completion import CompletionBody
from services.gateway.served_model import SamplingDefaults, load_model
from services.gateway.settings import GatewaySettings
from shared.errors import ConfigurationError, ContextLengthExceeded, InvalidRequest, ModelNotFound, UnsupportedField
from shared.identity import pack_tokens

SETTINGS = GatewaySettings(model="pydoc-mini")
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model():
    return load_model(SETTINGS, created=1)


@pytest.fixture
def completion(model):
    def build(unknown="refuse", **fields):
        raw = orjson.dumps({"model": "pydoc-mini", "prompt": "hi", **fields})
        return completion_request(parse_body(raw, CompletionBody, unknown), model, SETTINGS, created=1)

    return build


@pytest.fixture
def chat(model):
    def build(unknown="refuse", messages=USER, **fields):
        body = parse_body(orjson.dumps({"model": "pydoc-mini", "messages": messages, **fields}), ChatBody, unknown)
        template_messages(body.messages, unknown)
        return chat_request(body, "hi", model, SETTINGS, created=1)

    return build


@pytest.fixture
def chat_body():
    """Checked, its messages too."""

    def check(unknown, **fields):
        raw = orjson.dumps({"model": "pydoc-mini", "messages": USER, **fields})
        body = parse_body(raw, ChatBody, unknown)
        template_messages(body.messages, unknown)
        return body

    return check


def test_fields_reach_the_sampler(completion):
    request = completion(
        temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, seed=-1, presence_penalty=1, frequency_penalty=-1,
        repetition_penalty=1.1, logit_bias={"7": -100}, min_tokens=2, stop_token_ids=[9], ignore_eos=True, logprobs=3,
        max_tokens=5, n=2, stop="x", cache_salt="s", priority=-3, user="u",
    )  # fmt: skip
    sampling = request.sampling_for(5)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 0, 0.1)
    assert sampling.seed == 2**64 - 1
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 1.1)
    assert sampling.logit_bias == {7: -100}
    assert (sampling.min_tokens, sampling.stop_token_ids, sampling.ignore_eos) == (2, frozenset({9}), True)
    assert (sampling.num_logprobs, sampling.max_tokens) == (3, 5)
    assert (request.num_choices, request.stop, request.cache_salt, request.priority) == (2, ("x",), "s", -3)


def test_silent_request_gets_the_checkpoints_defaults_and_a_random_seed(completion):
    first, second = completion(), completion()
    assert first.sampling.temperature == 0.0  # generation_config.json says do_sample: false
    assert first.sampling.seed != second.sampling.seed


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], (pack_tokens([1, 2]),)),
        ([[1], [2, 3]], (pack_tokens([1]), pack_tokens([2, 3]))),
    ],
)
def test_prompt_is_text_tokens_or_a_batch_of_either(completion, prompt, prompts):
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    "prompt", [None, 5, [], [1, "a"], ["a", 1], [[1], "a"], [6144], [-1], [2**31], [2**63], [True], [[1.5]], {}]
)
def test_any_other_prompt_is_refused(completion, prompt):
    with pytest.raises(InvalidRequest, match="prompt") as caught:
        completion(prompt=prompt)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 2000}, "n"),
        ({"n": 129}, "n"),
        ({"best_of": 129}, "best_of"),
        ({"stop": {}}, "stop"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
        ({"logprobs": 21}, "logprobs"),
        ({"length_penalty": 0.5}, "length_penalty"),
        ({"logit_bias": {"05": 1, "5": -1}}, "logit_bias"),
        ({"logit_bias": {"\u0665": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"6144": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 3 + [str(i) for i in range(20)]}, "stop"),
        ({"stop": "x" * 2000}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop_token_ids": [9999]}, "stop_token_ids"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"seed": 2**63}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"cache_salt": ""}, "cache_salt"),
    ],
    ids=str,
)
def test_value_out_of_range_names_its_field(completion, fields, param):
    with pytest.raises(InvalidRequest) as caught:
        completion(**fields)
    assert caught.value.param == param
    assert caught.value.http_status == 400


def test_unknown_field_is_refused_with_a_suggestion(completion):
    with pytest.raises(InvalidRequest, match="did you mean 'temperature'") as caught:
        completion(temprature=1)
    assert caught.value.param == "temprature"


def test_unknown_field_is_ignored_when_told_so(completion):
    assert completion(unknown="ignore", temprature=1)


TOOL = {"type": "function", "function": {"name": "f"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {}}}
ALLOWED = {"mode": "auto", "tools": [TOOL]}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
NESTED = [
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    ({"response_format": {**SCHEMA, "x": 1}}, "response_format.x"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {}, "x": 1}}},
     "response_format.json_schema.x"),
    ({"structured_outputs": {"regex": "a", "x": 1}}, "structured_outputs.x"),
    ({"tools": [TOOL, {**TOOL, "x": 1}], "tool_choice": "none"}, "tools[1].x"),
    ({"tools": [{**TOOL, "function": {"name": "f", "x": 1}}], "tool_choice": "none"}, "tools[0].function.x"),
    ({"tools": [TOOL], "tool_choice": {**TOOL, "x": 1}}, "tool_choice.x"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {**ALLOWED, "x": 1}}},
     "tool_choice.allowed_tools.x"),
    ({"messages": [{"role": "user", "content": "hi", "x": 1}]}, "messages[0].x"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "x": 1}]}]}, "messages[0].content[0].x"),
    ({"messages": [{"role": "assistant", "tool_calls": [{**CALL, "function": {**CALL["function"], "x": 1}}]}]},
     "messages[0].tool_calls[0].function.x"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "path"), NESTED, ids=[path for _, path in NESTED])
def test_unknown_field_of_an_object_inside_is_refused_by_its_path_or_ignored(chat_body, fields, path):
    with pytest.raises(InvalidRequest, match="unknown field") as caught:
        chat_body("refuse", **fields)
    assert caught.value.param == path
    assert path in caught.value.message
    assert '"x"' not in chat_body("ignore", **fields).model_dump_json(exclude={"messages"})


@pytest.mark.parametrize("field", sorted({*CompletionBody.refused}))
def test_field_that_is_not_built_is_refused_with_its_reason(completion, field):
    with pytest.raises(UnsupportedField, match="not supported"):
        completion(**{field: {"ask": "for it"}})


@pytest.mark.parametrize("field", sorted({*ChatBody.refused}))
def test_field_that_asks_for_nothing_is_accepted(chat, field):
    for value in (None, *ChatBody.refused[field].neutral):
        assert chat(**{field: value})


def test_not_built_fields_are_refused_even_when_unknown_ones_are_ignored(chat):
    with pytest.raises(UnsupportedField, match="web search"):
        chat(unknown="ignore", web_search_options={"search_context_size": "low"})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "colour": "red"}]}, "messages[0].colour"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
    ],
    ids=str,
)
def test_chat_field_that_cannot_be_served_is_named(chat, fields, param):
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert caught.value.param == param


def test_message_parts_are_joined_and_developer_is_system():
    raw = [
        {"role": "developer", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}], "name": "n"},
    ]
    body = parse_body(orjson.dumps({"model": "m", "messages": raw}), ChatBody, "refuse")
    assert template_messages(body.messages, "refuse") == [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b\nc", "name": "n"},
    ]


def test_logprobs_of_both_shapes_mean_a_number_of_alternatives(chat, completion):
    assert chat(logprobs=True).sampling.num_logprobs == 0
    assert chat(logprobs=True, top_logprobs=4).sampling.num_logprobs == 4
    assert chat(logprobs=False).sampling.num_logprobs is None
    assert completion(logprobs=0).sampling.num_logprobs == 0


def test_unknown_model_is_named(completion):
    with pytest.raises(ModelNotFound, match="gpt-9"):
        completion(model="gpt-9")


@pytest.mark.parametrize(("raw", "said"), [(b"{", "JSON"), (b"[]", "object"), (b'{"prompt": "x"}', "model")])
def test_body_that_is_no_request_says_so(raw, said):
    with pytest.raises(InvalidRequest, match=said):
        parse_body(raw, CompletionBody, "refuse")


def test_output_limit_is_what_was_asked_or_what_is_left(completion, chat):
    assert output_limit(chat(), 100, context_len=1024, cache_len=4096) == 924
    assert output_limit(chat(max_completion_tokens=7), 100, context_len=1024, cache_len=4096) == 7
    assert output_limit(completion(), 100, context_len=1024, cache_len=4096) == 16
    assert output_limit(completion(), 1020, context_len=1024, cache_len=4096) == 4
    assert output_limit(completion(max_tokens=924), 100, context_len=1024, cache_len=4096) == 924


@pytest.mark.parametrize(
    ("fields", "num_tokens", "numbers"),
    [
        ({"max_tokens": 925}, 100, ("1025", "1024")),
        ({}, 1024, ("1024", "1024")),
        ({"min_tokens": 20}, 100, ("20", "16")),
    ],
)
def test_what_does_not_fit_the_context_is_refused_with_both_numbers(completion, fields, num_tokens, numbers):
    with pytest.raises(ContextLengthExceeded) as caught:
        output_limit(completion(**fields), num_tokens, context_len=1024, cache_len=4096)
    assert all(number in caught.value.message for number in numbers)


def test_request_without_a_limit_stays_within_a_small_cache(chat):
    assert output_limit(chat(), 100, context_len=1024, cache_len=500) == 400
    assert output_limit(chat(max_tokens=900), 100, context_len=1024, cache_len=500) == 900


def test_empty_prompt_is_refused(completion):
    with pytest.raises(InvalidRequest, match="empty"):
        output_limit(completion(prompt=""), 0, context_len=1024, cache_len=4096)


def test_default_that_is_no_number_stops_the_start(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"temperature": "warm"}')
    with pytest.raises(ConfigurationError, match="temperature"):
        SamplingDefaults.from_pretrained(tmp_path)
