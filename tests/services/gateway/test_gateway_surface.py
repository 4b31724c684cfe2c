"""Models, tokens, openapi.json, request ids and cross-origin rules: the surface around generation."""

from __future__ import annotations

import anthropic
import httpx2
import pytest

from shared.identity import unpack_tokens

MESSAGES = [{"role": "user", "content": "What does json.dumps do?"}]


async def test_a_model_is_described_alone_and_in_the_list(running):
    listed = (await running.openai.models.list()).data[0]
    alone = await running.openai.models.retrieve("pydoc-mini")
    assert listed == alone
    assert alone.max_model_len == 1024
    assert alone.root.endswith("pydoc-mini")


async def test_models_come_in_anthropics_shape_to_anthropics_client(running):
    async with httpx2.AsyncClient(timeout=20, verify=False) as http:
        models = anthropic.AsyncAnthropic(base_url=running.url, api_key="none", max_retries=0, http_client=http).models
        listed = await models.list()
        assert (listed.has_more, listed.first_id, listed.last_id) == (False, "pydoc-mini", "pydoc-mini")
        [model] = [model async for model in listed]
        assert model == await models.retrieve("pydoc-mini")
        assert (model.id, model.type, model.display_name) == ("pydoc-mini", "model", "pydoc-mini")
        assert model.created_at.timestamp() == (await running.openai.models.retrieve("pydoc-mini")).created
        assert (await models.list(after_id="pydoc-mini")).data == []
        for call in (models.retrieve("nope"), models.list(after_id="nope")):
            with pytest.raises(anthropic.APIStatusError) as caught:
                await call
            assert caught.value.body["type"] == "error"


async def test_text_becomes_tokens_and_tokens_become_text(running, text_ids):
    reply = (await running.http.post("/tokenize", json={"prompt": "Grüße!", "return_token_strs": True})).json()
    assert reply["tokens"] == text_ids("Grüße!")
    assert reply["count"] == len(reply["tokens"]) == len(reply["token_strs"])
    assert reply["max_model_len"] == 1024
    back = await running.http.post("/detokenize", json={"model": "pydoc-mini", "tokens": reply["tokens"]})
    assert back.json() == {"prompt": "Grüße!"}


async def test_a_conversation_becomes_the_tokens_that_generation_begins_with(running):
    await running.openai.chat.completions.create(model="pydoc-mini", messages=MESSAGES)
    reply = (await running.http.post("/tokenize", json={"messages": MESSAGES})).json()
    assert reply["tokens"] == unpack_tokens(running.worker.submits[0].prompt_tokens)
    assert reply["token_strs"] is None


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "bananas": 1}, "bananas"),
        ("/tokenize", {}, "prompt"),
        ("/detokenize", {"tokens": [1, 6144]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ],
)
async def test_a_wrong_token_request_names_the_field(running, path, body, param):
    reply = await running.http.post(path, json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


async def test_openapi_names_every_route_and_the_refused_fields(running):
    document = (await running.http.get("/openapi.json")).json()
    assert {"/v1/chat/completions", "/v1/models/{name}", "/tokenize", "/version"} <= set(document["paths"])
    schema = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"]["suffix"]["description"].startswith("Refused")
    assert schema["additionalProperties"] is False
    assert schema["properties"]["model"]["enum"] == ["pydoc-mini"]
    assert "$defs" not in str(document)
    assert (await running.http.get("/docs")).status_code == 200


async def test_a_request_id_is_echoed_or_minted(running):
    echoed = await running.http.get("/version", headers={"x-request-id": "abc-1"})
    minted = await running.http.get("/nope", headers={"x-request-id": "x" * 300})
    assert echoed.headers["x-request-id"] == echoed.headers["request-id"] == "abc-1"
    assert minted.headers["x-request-id"].startswith("req_")


async def test_head_answers_as_get_without_a_body(running):
    reply = await running.http.head("/v1/models")
    assert (reply.status_code, reply.content) == (200, b"")
    assert int(reply.headers["content-length"]) > 0


async def test_other_origins_may_call_only_if_the_setting_says_so(start_gateway, running):
    asks = {"origin": "https://page.example", "access-control-request-method": "POST"}
    assert (await running.http.options("/v1/completions", headers=asks)).status_code == 405
    async with start_gateway(cors_origins="https://page.example") as open_gateway:
        preflight = await open_gateway.http.options("/v1/completions", headers=asks)
        assert preflight.headers["access-control-allow-origin"] == "https://page.example"
        stranger = await open_gateway.http.get("/version", headers={"origin": "https://else.example"})
        assert "access-control-allow-origin" not in stranger.headers
