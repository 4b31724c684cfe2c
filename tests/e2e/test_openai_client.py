"""The official client against the real suite."""

from __future__ import annotations

import httpx
import openai
import pytest

MODEL = "pydoc-mini"
QUESTION = [{"role": "user", "content": "What does json.dumps do?"}]


def test_chat_answers_from_the_standard_library(suite):
    reply = suite.client().chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    assert "JSON" in reply.choices[0].message.content
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens > 0


def test_stream_gives_the_same_text_as_one_reply(suite):
    client = suite.client()
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    stream = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    events = list(stream)
    text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    assert text == whole.choices[0].message.content
    assert events[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_n_choices_are_seeded_and_independent(suite):
    client = suite.client()
    arguments = {"model": MODEL, "prompt": "def ", "n": 3, "temperature": 1.5, "seed": 7, "max_tokens": 16}
    first, second = client.completions.create(**arguments), client.completions.create(**arguments)
    assert [c.text for c in first.choices] == [c.text for c in second.choices]
    assert len({c.text for c in first.choices}) > 1
    assert [c.index for c in first.choices] == [0, 1, 2]


def test_greedy_choices_are_equal(suite):
    reply = suite.client().chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, n=4)
    assert len({c.message.content for c in reply.choices}) == 1


def test_logprobs_are_descending_and_contain_the_sampled_token(suite):
    reply = suite.client().chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, logprobs=True, top_logprobs=3, max_tokens=5
    )
    for entry in reply.choices[0].logprobs.content:
        tops = [top.logprob for top in entry.top_logprobs]
        assert tops == sorted(tops, reverse=True)
        assert len(tops) == 3
        assert entry.logprob == pytest.approx(tops[0], abs=1e-5)


def test_stop_string_ends_the_text_before_it(suite):
    client = suite.client()
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0).choices[0].message.content
    stop = whole[10:14]
    reply = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, stop=[stop])
    assert reply.choices[0].message.content == whole[: whole.index(stop)]
    assert reply.choices[0].finish_reason == "stop"


def test_models_are_listed(suite):
    assert [model.id for model in suite.client().models.list()] == [MODEL]


def test_unknown_model_is_a_404(suite):
    with pytest.raises(openai.NotFoundError) as caught:
        suite.client().chat.completions.create(model="gpt-9", messages=QUESTION)
    assert "gpt-9" in caught.value.message


def test_prompt_longer_than_the_context_names_both_numbers(suite):
    with pytest.raises(openai.BadRequestError) as caught:
        suite.client().completions.create(model=MODEL, prompt=[5] * 9000, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    assert "9000" in caught.value.message or "9001" in caught.value.message
    assert "4096" in caught.value.message


def test_huge_max_tokens_is_refused_with_both_numbers(suite):
    with pytest.raises(openai.BadRequestError) as caught:
        suite.client().chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=10**6)
    assert "1000000" in caught.value.message.replace(",", "")
    assert "4096" in caught.value.message


@pytest.mark.parametrize(
    "body",
    [b"{", b"[]", b'{"model": "pydoc-mini"}', b'{"model": "pydoc-mini", "messages": "hello"}', b'{"model": 3}'],
    ids=["malformed", "not-an-object", "messages-missing", "messages-of-wrong-type", "model-of-wrong-type"],
)
def test_bad_bodies_get_an_openai_error(suite, body):
    reply = httpx.post(f"{suite.url}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_probes_and_metrics_answer(suite):
    assert httpx.get(f"{suite.url}/health").status_code == 200
    assert httpx.get(f"{suite.url}/live").status_code == 200
    assert httpx.get(f"{suite.url}/ready").status_code == 200
    assert httpx.get(f"{suite.url}/version").json()["version"]
    assert "vllm:time_to_first_token_seconds" in httpx.get(f"{suite.url}/metrics").text
