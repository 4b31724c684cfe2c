"""Embeddings with OpenAI's client, and a fake worker whose vectors tell what it was asked."""

from __future__ import annotations

import base64
from array import array
from dataclasses import replace

import openai
import pytest

from protos import worker_pb2 as pb
from shared.errors import CapacityExceeded


async def test_texts_and_tokens_come_back_in_order(running, text_ids):
    create = running.openai.embeddings.create
    texts = await create(model="pydoc-mini", input=["json", "asyncio.run"])
    tokens = await create(model="pydoc-mini", input=[text_ids("json"), text_ids("asyncio.run")])
    assert [item.embedding[:2] for item in texts.data] == [
        [len(ids), ids[0]] for ids in (text_ids("json"), text_ids("asyncio.run"))
    ]
    assert [item.embedding for item in tokens.data] == [item.embedding for item in texts.data]
    assert [item.index for item in texts.data] == [0, 1]
    assert texts.usage.prompt_tokens == len(text_ids("json")) + len(text_ids("asyncio.run"))
    [call, _] = running.worker.embeds
    assert (call.pooling, call.normalize, call.dimensions) == (pb.POOLING_LAST, True, 0)


async def test_normalizing_has_two_names(running):
    body = {"model": "pydoc-mini", "input": "json", "use_activation": False}
    assert (await running.http.post("/v1/embeddings", json=body)).status_code == 200
    assert not running.worker.embeds[0].normalize
    both = await running.http.post("/v1/embeddings", json={**body, "normalize": True})
    assert both.json()["error"]["param"] == "use_activation"


async def test_base64_is_the_same_numbers(running):
    body = {"model": "pydoc-mini", "input": "json"}
    floats = (await running.http.post("/v1/embeddings", json=body)).json()["data"][0]["embedding"]
    encoded = (await running.http.post("/v1/embeddings", json={**body, "encoding_format": "base64"})).json()
    assert array("f", base64.b64decode(encoded["data"][0]["embedding"])).tolist() == floats


async def test_many_inputs_are_several_calls(running):
    reply = await running.openai.embeddings.create(model="pydoc-mini", input=["a", "bb"] * 100)
    assert [len(call.inputs) for call in running.worker.embeds] == [128, 72]
    assert [item.index for item in reply.data] == list(range(200))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"input": []}, "non-empty"),
        ({"input": ""}, "no tokens"),
        ({"input": [[1], "a"]}, "mix"),
        ({"input": [6144]}, "token id"),
        ({"input": ["a"] * 5}, "at most 4"),
        ({"input": "a " * 2000}, "at most 1024"),
        ({"dimensions": 64}, "Matryoshka"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"bananas": 1}, "bananas"),
    ],
)
async def test_refusals_say_why(start_gateway, change, told):
    async with start_gateway(max_embedding_inputs=4) as running:
        body = {"model": "pydoc-mini", "input": "hi", **change}
        reply = await running.http.post("/v1/embeddings", json=body)
        assert reply.status_code == 400
        assert told in reply.json()["error"]["message"]
        assert not running.worker.embeds


async def test_dimensions_are_cut_where_the_checkpoint_says_so(start_gateway, served_model):
    trained = replace(served_model, embedding=replace(served_model.embedding, dimensions=(64, 128)))
    async with start_gateway(model_override=trained) as running:
        cut = await running.openai.embeddings.create(model="pydoc-mini", input="json", dimensions=64)
        assert len(cut.data[0].embedding) == 64
        with pytest.raises(openai.BadRequestError, match="64, 128"):
            await running.openai.embeddings.create(model="pydoc-mini", input="json", dimensions=65)


async def test_a_workers_refusal_and_its_death_are_told_apart(start_gateway):
    async with start_gateway(num_workers=2) as running:
        first, second = running.workers.values()
        first.script.failure = second.script.failure = CapacityExceeded("too big")
        with pytest.raises(openai.BadRequestError, match="too big"):
            await running.openai.embeddings.create(model="pydoc-mini", input="json")
        second.script.failure = None
        await first.stop()
        reply = await running.openai.embeddings.create(model="pydoc-mini", input="json")
        assert len(reply.data) == 1
        await second.stop()
        with pytest.raises(openai.InternalServerError) as caught:
            await running.openai.embeddings.create(model="pydoc-mini", input="json")
        assert caught.value.status_code == 503
