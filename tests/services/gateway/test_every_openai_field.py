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

from services.gateway.schemas.body import StreamOptions
from services.gateway.schemas.chat import ChatBody, ChatMessage
from services.gateway.schemas.completion import CompletionBody

# vLLM's own, of its request classes as of November 2026.
VLLM = [
    "use_beam_search",
    "top_k",
    "min_p",
    "repetition_penalty",
    "length_penalty",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "truncate_prompt_tokens",
    "truncation_side",
    "prompt_logprobs",
    "allowed_token_ids",
    "bad_words",
    "structured_outputs",
    "priority",
    "request_id",
    "return_tokens_as_token_ids",
    "return_token_ids",
    "cache_salt",
    "kv_transfer_params",
    "ec_transfer_params",
    "vllm_xargs",
    "logprob_token_ids",
    "watermarking",
    "repetition_detection",
    "session_id",
    "add_special_tokens",
]
VLLM_CHAT = [
    "thinking_token_budget",
    "include_reasoning",
    "echo",
    "add_generation_prompt",
    "continue_final_message",
    "documents",
    "chat_template",
    "chat_template_kwargs",
    "media_io_kwargs",
    "mm_processor_kwargs",
    "return_prompt_text",
]


def fields_of(params: type) -> set[str]:
    return {name for base in (params, *params.__mro__) for name in getattr(base, "__annotations__", {})}


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (ChatBody, fields_of(chat_create_params.CompletionCreateParamsStreaming)),
        (CompletionBody, fields_of(completion_create_params.CompletionCreateParamsStreaming)),
        (ChatBody, {*VLLM, *VLLM_CHAT}),
        (CompletionBody, set(VLLM)),
        (ChatMessage, fields_of(chat_completion_assistant_message_param.ChatCompletionAssistantMessageParam)),
        (ChatMessage, fields_of(chat_completion_tool_message_param.ChatCompletionToolMessageParam)),
    ],
    ids=["chat", "completion", "vllm-chat", "vllm-completion", "assistant", "tool"],
)
def test_field_is_honoured_or_refused_with_its_reason(body, names):
    assert len(names) > 2
    assert names - set(body.model_fields) - set(body.refused) == set()
    assert not set(body.model_fields) & set(body.refused)


def test_stream_options_are_known():
    names = fields_of(chat_completion_stream_options_param.ChatCompletionStreamOptionsParam)
    assert names <= set(StreamOptions.model_fields)
