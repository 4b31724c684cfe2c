"""Chat through the whole gateway: the official client in front, a scripted worker behind."""

from __future__ import annotations

from shared.identity import unpack_tokens

MESSAGES = [{"role": "user", "content": "What does json.dumps do?"}]


async def test_reply_has_the_workers_tokens_as_text(running, text_ids):
    running.worker.script.token_ids = text_ids("Serialize an object.")
    reply = await running.openai.chat.completions.create(model="pydoc-mini", messages=MESSAGES)
    assert reply.choices[0].message.content == "Serialize an object."
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens == len(running.worker.script.token_ids) + 1
    assert reply.usage.prompt_tokens == len(unpack_tokens(running.worker.submits[0].prompt_tokens))
    assert reply.usage.prompt_tokens_details.cached_tokens == 16


async def test_stream_adds_up_to_the_whole_reply(running, text_ids):
    running.worker.script.token_ids = text_ids("Grüße, 世界 🎉! Serialize.")
    stream = await running.openai.chat.completions.create(
        model="pydoc-mini", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Grüße, 世界 🎉! Serialize."
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == len(running.worker.script.token_ids) + 1
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all("\ufffd" not in (c.choices[0].delta.content or "") for c in chunks if c.choices)


async def test_choices_are_one_session_and_come_in_order(running, text_ids):
    running.worker.script.token_ids = text_ids("same")
    reply = await running.openai.chat.completions.create(model="pydoc-mini", messages=MESSAGES, n=3)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert {choice.message.content for choice in reply.choices} == {"same"}
    [submit] = running.worker.submits
    assert submit.num_choices == 3
    assert reply.usage.prompt_tokens == len(unpack_tokens(submit.prompt_tokens))
    assert reply.usage.completion_tokens == 3 * (len(text_ids("same")) + 1)


async def test_streamed_choices_are_told_apart_by_index(running, text_ids):
    running.worker.script.token_ids = text_ids("several tokens here")
    stream = await running.openai.chat.completions.create(model="pydoc-mini", messages=MESSAGES, n=2, stream=True)
    texts = {0: "", 1: ""}
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {0: "several tokens here", 1: "several tokens here"}


async def test_logprobs_spell_the_content_streamed_or_not(running, text_ids):
    running.worker.script.token_ids = text_ids("Grüße!")
    arguments = {"model": "pydoc-mini", "messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
    reply = await running.openai.chat.completions.create(**arguments)
    entries = reply.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == "Grüße!"
    assert [len(entry.top_logprobs) for entry in entries] == [2] * len(entries)
    assert entries[0].logprob == -0.5
    streamed = []
    async for chunk in await running.openai.chat.completions.create(**arguments, stream=True):
        streamed += [entry for choice in chunk.choices if choice.logprobs for entry in choice.logprobs.content]
    assert streamed == entries


async def test_length_ends_a_reply_as_length(running, text_ids):
    running.worker.script.token_ids = text_ids("a long answer that is cut")
    reply = await running.openai.chat.completions.create(model="pydoc-mini", messages=MESSAGES, max_tokens=2)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 2


async def test_reply_without_a_limit_may_fill_the_workers_context(running):
    await running.openai.chat.completions.create(model="pydoc-mini", messages=MESSAGES)
    [submit] = running.worker.submits
    assert submit.sampling.max_tokens == 1024 - len(unpack_tokens(submit.prompt_tokens))


async def test_stop_string_ends_the_text_and_the_work(running, text_ids):
    running.worker.script.token_ids = text_ids("first line\nsecond line\nthird line and more of it")
    running.worker.script.step_s = 0.02
    reply = await running.openai.chat.completions.create(model="pydoc-mini", messages=MESSAGES, stop=["line\nt"])
    assert reply.choices[0].message.content == "first line\nsecond "
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].stop_reason == "line\nt"
    assert reply.usage.prompt_tokens_details.cached_tokens == 16  # from the worker's last word after the abort
    [abort] = running.worker.aborts
    assert list(abort.sequences) == [running.worker.submits[0].first_sequence]


async def test_stop_string_of_one_choice_leaves_the_others_alone(running, text_ids):
    running.worker.script.token_ids = text_ids("go on END and on")
    reply = await running.openai.chat.completions.create(model="pydoc-mini", messages=MESSAGES, n=2, stop="END")
    assert [choice.message.content for choice in reply.choices] == ["go on ", "go on "]


async def test_worker_that_does_not_answer_an_abort_delays_the_reply_only_a_little(start_gateway, text_ids):
    async with start_gateway(abort_grace_s=0.05) as running:
        running.worker.script.token_ids = text_ids("one STOP two three four")
        running.worker.script.step_s = 0.05
        running.worker.script.answers_abort = False
        reply = await running.openai.chat.completions.create(model="pydoc-mini", messages=MESSAGES, stop="STOP")
        assert reply.choices[0].message.content == "one "


async def test_timing_tells_prediction_and_report(running):
    reply = await running.openai.chat.completions.create(
        model="pydoc-mini", messages=MESSAGES, extra_body={"timing": True}
    )
    timing = reply.model_extra["timing"]
    [session] = timing["sessions"]
    assert 0 <= timing["tokenized_s"] <= timing["placed_s"] <= timing["first_token_s"] <= timing["last_token_s"]
    assert session["mode"] == "local"
    assert session["decode_worker"] == "decode-0"
    assert session["predicted"]["mode"] == "local"
    assert session["local_blocks"] == 1


async def test_timing_comes_last_in_a_stream(running):
    stream = await running.openai.chat.completions.create(
        model="pydoc-mini", messages=MESSAGES, stream=True, extra_body={"timing": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices == []
    assert chunks[-1].model_extra["timing"]["sessions"]
