"""Whatever is sent gets an answer that is no 5xx and is as openapi.json says, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from services.gateway.anthropic.schemas import MessagesBody
from services.gateway.embeddings.schemas import EmbeddingBody
from services.gateway.responses.schemas import ResponseBody
from services.gateway.schemas.body import Body
from services.gateway.schemas.chat import ChatBody
from services.gateway.schemas.completion import CompletionBody
from services.gateway.schemas.tokens import TokenizeChatBody

CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
TIMEOUT_S = 20.0
MESSAGES = [{"role": "user", "content": "hi"}]
BODIES: dict[str, tuple[type[Body], dict]] = {
    "/v1/chat/completions": (ChatBody, {"messages": MESSAGES, "max_tokens": 4}),
    "/v1/completions": (CompletionBody, {"prompt": "hi", "max_tokens": 4}),
    "/v1/responses": (ResponseBody, {"input": "hi", "max_output_tokens": 4}),
    "/v1/messages": (MessagesBody, {"messages": MESSAGES, "max_tokens": 4}),
    "/v1/embeddings": (EmbeddingBody, {"input": "hi"}),
    "/tokenize": (TokenizeChatBody, {"messages": MESSAGES}),
}
SCHEMAS = st.sampled_from(
    [
        {"type": "object"},
        {"type": "array", "items": {"type": "integer"}},
        {"$ref": "#/nowhere"},
        {"$ref": "#"},
        {"allOf": [{}, False]},
        {"type": "string", "pattern": "(("},
        {"type": "string", "minLength": 5, "maxLength": 2},
    ]
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=12)
    | st.sampled_from(["", "\x00", "\ud800", "auto", "required", "json_schema", "function", "text", "a" * 5000])
    | SCHEMAS
)
KEYS = st.sampled_from(
    [
        "type",
        "name",
        "function",
        "parameters",
        "json_schema",
        "schema",
        "content",
        "text",
        "role",
        "id",
        "format",
        "json",
    ]
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=8
)


def bounded(examples: int):
    """Few examples, the same every time; a slow machine is no failure."""
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )


async def nothing_is_left(running) -> None:
    async with asyncio.timeout(30):
        while running.open_sessions or running.gateway.background._runs:
            await asyncio.sleep(0.02)
    assert (await running.http.get("/ready")).status_code == 200


@pytest.fixture
def start(start_gateway, tmp_path):
    return lambda: start_gateway(files_dir=tmp_path / "files", request_timeout_s=10.0, max_embedding_inputs=8)


@pytest.mark.timeout(240)
async def test_every_operation_answers_as_openapi_json_says(start):
    async with start() as running:
        await asyncio.to_thread(_try_operations, running.url)
        await nothing_is_left(running)


def _try_operations(url: str) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 30
    for operation in operations:

        @bounded(6)
        @given(case=operation.as_strategy())
        def answers(case):
            case.call_and_validate(checks=CHECKS, timeout=TIMEOUT_S)

        answers()


@pytest.mark.timeout(240)
async def test_any_value_in_any_field_gets_an_answer(start):
    async with start() as running:
        await asyncio.to_thread(_try_fields, running.url)
        await nothing_is_left(running)


def _try_fields(url: str) -> None:
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
        for path, (body, base) in BODIES.items():
            _try_path(client, path, base, st.sampled_from([*body.model_fields, *body.refused]))


def _try_path(client: httpx.Client, path: str, base: dict, names: st.SearchStrategy[str]) -> None:
    @bounded(60)
    @given(fields=st.dictionaries(names, VALUES, min_size=1, max_size=3))
    def answers(fields):
        content = json.dumps({"model": "pydoc-mini", **base, **fields}).encode()
        reply = client.post(path, content=content, headers={"content-type": "application/json"})
        assert reply.status_code < 500, reply.text
        if reply.status_code != 200:
            assert "error" in reply.json()

    answers()


@pytest.mark.timeout(240)
async def test_any_bytes_get_an_answer(start):
    async with start() as running:
        await asyncio.to_thread(_try_bytes, running.url)
        await nothing_is_left(running)


def _try_bytes(url: str) -> None:
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:

        @bounded(80)
        @given(
            path=st.sampled_from([*BODIES, "/v1/batches", "/v1/files", "/detokenize", "/v2/models/pydoc-mini/infer"]),
            content=st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()),
        )
        def answers(path, content):
            assert 400 <= client.post(path, content=content).status_code < 500

        answers()
