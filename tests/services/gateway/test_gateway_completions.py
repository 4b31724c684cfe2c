"""Completions through the whole gateway."""

from __future__ import annotations

import orjson

from shared.identity import unpack_tokens


async def test_default_is_sixteen_tokens(running, text_ids):
    running.worker.script.token_ids = text_ids("word " * 30)
    reply = await running.openai.completions.create(model="pydoc-mini", prompt="say")
    assert reply.usage.completion_tokens == 16
    assert reply.choices[0].finish_reason == "length"


async def test_batch_of_prompts_times_n_is_numbered_through(running, text_ids):
    running.worker.script.token_ids = text_ids("x")
    reply = await running.openai.completions.create(model="pydoc-mini", prompt=["one", "two two"], n=2)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert [unpack_tokens(submit.prompt_tokens) for submit in running.worker.submits] == [
        text_ids("one"),
        text_ids("two two"),
    ]
    assert reply.usage.prompt_tokens == len(text_ids("one")) + len(text_ids("two two"))


async def test_token_ids_reach_the_worker_unchanged(running):
    await running.openai.completions.create(model="pydoc-mini", prompt=[[5, 6, 7], [8]])
    assert [unpack_tokens(submit.prompt_tokens) for submit in running.worker.submits] == [[5, 6, 7], [8]]


async def test_echo_begins_with_the_prompt(running, text_ids):
    running.worker.script.token_ids = text_ids(" there")
    reply = await running.openai.completions.create(model="pydoc-mini", prompt="hi", echo=True)
    assert reply.choices[0].text == "hi there"
    stream = await running.openai.completions.create(model="pydoc-mini", prompt="hi", echo=True, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "hi there"


async def test_logprobs_have_parallel_lists_and_offsets(running, text_ids, model_files):
    running.worker.script.token_ids = text_ids("two words")
    reply = await running.openai.completions.create(model="pydoc-mini", prompt="hi", logprobs=1)
    logprobs = reply.choices[0].logprobs
    assert "".join(logprobs.tokens) == "two words" == reply.choices[0].text
    assert all(
        reply.choices[0].text[at:].startswith(token)
        for at, token in zip(logprobs.text_offset, logprobs.tokens, strict=True)
    )
    assert logprobs.token_logprobs == [-0.5] * len(logprobs.tokens)
    assert [dict(top) for top in logprobs.top_logprobs] == [{token: -0.5} for token in logprobs.tokens]


async def test_end_of_a_stream_goes_with_its_last_tokens(running):
    body = {"model": "pydoc-mini", "prompt": "hi", "stream": True, "max_tokens": 3}
    async with running.http.stream("POST", "/v1/completions", json=body) as reply:
        pieces = [piece async for piece in reply.aiter_raw()]
    assert b'"finish_reason":"length"' in pieces[-1]
    assert pieces[-1].endswith(b"data: [DONE]\n\n")


async def test_stream_is_server_sent_events_ending_in_done(running, text_ids):
    running.worker.script.token_ids = text_ids('quote " and \\ and\nnewline')
    body = {"model": "pydoc-mini", "prompt": "hi", "stream": True, "stream_options": {"include_usage": True}}
    reply = await running.http.post("/v1/completions", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [orjson.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == 'quote " and \\ and\nnewline'
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert (
        chunks[-1]["usage"]["total_tokens"]
        == chunks[-1]["usage"]["prompt_tokens"] + len(running.worker.script.token_ids) + 1
    )


async def test_tokens_that_arrive_together_leave_together(running, text_ids):
    running.worker.script.token_ids = text_ids("many tokens of one step leave in one chunk")
    running.worker.script.tokens_per_step = 100
    stream = await running.openai.completions.create(model="pydoc-mini", prompt="hi", stream=True, max_tokens=100)
    texts = [chunk.choices[0].text async for chunk in stream]
    assert texts == ["many tokens of one step leave in one chunk", ""]


async def test_sampling_instructions_reach_the_worker(running):
    await running.openai.completions.create(
        model="pydoc-mini",
        prompt="hi",
        temperature=0.25,
        seed=7,
        max_tokens=3,
        logit_bias={"5": -1},
        extra_body={"top_k": 4, "cache_salt": "salt", "priority": 2, "stop_token_ids": [9]},
    )
    [submit] = running.worker.submits
    assert (submit.sampling.temperature, submit.sampling.seed, submit.sampling.top_k) == (0.25, 7, 4)
    assert dict(submit.sampling.logit_bias) == {5: -1.0}
    assert list(submit.sampling.stop_token_ids) == [9]
    assert not submit.sampling.HasField("num_logprobs")
    assert (submit.cache_salt, submit.priority) == ("salt", 2)
    assert submit.timeout_s == 600


async def test_long_prompt_is_tokenized_as_a_short_one(running, text_ids):
    text = "json.dumps does " * 300
    reply = await running.http.post("/v1/completions", json={"model": "pydoc-mini", "prompt": text, "max_tokens": 1})
    assert reply.status_code == 400
    assert str(len(text_ids(text))) in reply.json()["error"]["message"]
    assert "1024" in reply.json()["error"]["message"]
