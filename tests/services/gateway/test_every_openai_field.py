"""No field that OpenAI's own client can send is unknown here: each is honoured, or refused with its reason."""

from __future__ import annotations

import pytest
from openai.types import completion_create_params
from openai.types.chat import (
    chat_completion_assistant_message_param,
    chat_completion_stream_options_param,
    chat_completion_tool_message_param,
)
from openai.types.chat import (
    completion_create_params as chat_create_params,
)

from services.gateway.field_table import ENDPOINTS, vllm_endpoints
from services.gateway.schemas.chat import ChatBody, ChatMessage
from services.gateway.schemas.completion import CompletionBody
from services.gateway.schemas.generation import StreamOptions


def fields_of(params: type) -> set[str]:
    return {name for base in (params, *params.__mro__) for name in getattr(base, "__annotations__", {})}


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (ChatBody, fields_of(chat_create_params.CompletionCreateParamsStreaming)),
        (CompletionBody, fields_of(completion_create_params.CompletionCreateParamsStreaming)),
        (ChatMessage, fields_of(chat_completion_assistant_message_param.ChatCompletionAssistantMessageParam)),
        (ChatMessage, fields_of(chat_completion_tool_message_param.ChatCompletionToolMessageParam)),
    ],
    ids=["chat", "completion", "assistant", "tool"],
)
def test_field_is_honoured_or_refused_with_its_reason(body, names):
    assert len(names) > 2
    assert names - set(body.model_fields) - set(body.refused) == set()
    assert not set(body.model_fields) & set(body.refused)


@pytest.mark.parametrize("path", vllm_endpoints())
def test_vllms_field_is_honoured_or_refused_with_its_reason(path):
    known = {name for body in ENDPOINTS[path] for name in (*body.model_fields, *body.refused)}
    assert set(vllm_endpoints()[path].fields) - known == set()


def test_stream_options_are_known():
    names = fields_of(chat_completion_stream_options_param.ChatCompletionStreamOptionsParam)
    assert names <= set(StreamOptions.model_fields)
