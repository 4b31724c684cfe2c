"""Aggregated and disaggregated serving give equal output: the same workers, with and without a prefill worker."""

from __future__ import annotations

import uuid

import pytest

MODEL = "pydoc-mini"
BLOCK = 16
FILLER = "The report was read twice and filed. Nobody asked for a second copy. "


def ask(suite, url: str, **fields) -> tuple[object, dict]:
    """One completion in a cache of its own; returns the reply and its timing block."""
    reply = suite.client(url).completions.create(
        model=MODEL, extra_body={"cache_salt": uuid.uuid4().hex, "timing": True}, **fields
    )
    return reply, reply.model_dump()["timing"]["sessions"][0]


@pytest.mark.parametrize("num_tokens", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 511, 512, 513, 529, 1100])
def test_greedy_tokens_are_equal_around_block_and_chunk_borders(suite, num_tokens):
    prompt = [(37 * i + 11) % 1000 + 300 for i in range(num_tokens)]
    fields = {"prompt": prompt, "temperature": 0, "max_tokens": 12, "logprobs": 2}
    remote, remote_timing = ask(suite, suite.url, **fields)
    local, local_timing = ask(suite, suite.local_url, **fields)
    assert remote.choices[0].text == local.choices[0].text
    assert remote.choices[0].logprobs.tokens == local.choices[0].logprobs.tokens
    assert remote.choices[0].logprobs.token_logprobs == pytest.approx(
        local.choices[0].logprobs.token_logprobs, abs=2e-3
    )
    assert local_timing["mode"] == "local"
    assert remote_timing["mode"] == ("remote_prefill" if num_tokens > BLOCK else "local")


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.9, "seed": 3, "n": 4},
        {"temperature": 1.2, "seed": 5, "top_p": 0.9, "presence_penalty": 0.7, "frequency_penalty": 0.2},
        {"temperature": 0, "stop": ["the"], "n": 2},
        {"temperature": 0, "logit_bias": {"300": 5.0}},
    ],
    ids=["seeded-n4", "penalties", "stop", "bias"],
)
def test_sampling_is_equal(suite, fields):
    prompt = FILLER * 6
    remote, timing = ask(suite, suite.url, prompt=prompt, max_tokens=24, **fields)
    local, _ = ask(suite, suite.local_url, prompt=prompt, max_tokens=24, **fields)
    assert timing["mode"] == "remote_prefill"
    assert [c.text for c in remote.choices] == [c.text for c in local.choices]
    assert [c.finish_reason for c in remote.choices] == [c.finish_reason for c in local.choices]
    assert remote.usage.completion_tokens == local.usage.completion_tokens


def test_second_turn_reuses_the_cache_and_gives_the_same_answer(suite):
    client, salt = suite.client(), uuid.uuid4().hex
    messages = [{"role": "system", "content": FILLER * 8}, {"role": "user", "content": "What does math.gcd do?"}]
    extra = {"cache_salt": salt, "timing": True}
    first = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, extra_body=extra)
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "What does os.path.join do?"},
    ]
    warm = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, extra_body=extra)
    cold = client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, extra_body={"cache_salt": uuid.uuid4().hex}
    )
    assert warm.usage.prompt_tokens_details.cached_tokens >= 100
    assert cold.usage.prompt_tokens_details.cached_tokens == 0
    assert warm.choices[0].message.content == cold.choices[0].message.content
