"""A Responses body as a chat body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.gateway.requests.body_reader import UnknownFields, check_names, validate
from services.gateway.requests.metadata import check_metadata
from services.gateway.responses.input_items import Item, chat_turns
from services.gateway.responses.schemas import LOGPROBS, PromptBody, ResponseBody
from services.gateway.schemas.chat import ChatBody
from services.gateway.schemas.tools import NO_CUSTOM_TOOLS
from shared.errors import InvalidRequest, UnsupportedField

CLIENT_WORDS = {
    "reasoning_effort": "reasoning.effort",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
}
"""For `in_words_of`."""
_SUMMARIES = ("summary", "generate_summary")
EXTRAS = (
    "top_k",
    "min_p",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "structured_outputs",
    "cache_salt",
    "priority",
)
"""Fields that mean here what they mean in a chat."""


def chat_body(body: PromptBody, items: Sequence[Item], unknown_fields: UnknownFields) -> ChatBody:
    """The chat that the items and instructions make up.

    Raises:
        InvalidRequest: A field that cannot be served.
    """
    turns: list[Item] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    turns += chat_turns(items)
    content: dict[str, Any] = {
        "model": body.model,
        "messages": turns,
        **_tools(body, unknown_fields),
        **_reasoning(body, unknown_fields),
    }
    if body.text is not None:
        content["response_format"] = _response_format(body.text.format)
    if isinstance(body, ResponseBody):
        content |= {"temperature": body.temperature, "top_p": body.top_p, "stream": body.stream}
        content |= {"max_completion_tokens": body.max_output_tokens, "user": body.user}
        content |= {name: getattr(body, name) for name in EXTRAS}
        if body.wants_logprobs:
            content |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
        _check_options(body)
    return validate(content, ChatBody, unknown_fields)


def _check_options(body: ResponseBody) -> None:
    for name in body.include or ():
        if name != LOGPROBS:
            raise UnsupportedField(f"'include': {name[:64]!r} is not supported, only {LOGPROBS!r} is", param="include")
    check_metadata(body.metadata)
    if body.background and body.store is False:
        raise InvalidRequest("'background' needs 'store': the response is read from there later", param="store")


def _response_format(wanted: dict[str, object] | None) -> dict[str, object] | None:
    """`text.format` as chat's `response_format`, which nests what is flat here."""
    if wanted is None or wanted.get("type") != "json_schema":
        return wanted
    return {"type": "json_schema", "json_schema": {k: v for k, v in wanted.items() if k != "type"}}


def _tools(body: PromptBody, unknown_fields: UnknownFields) -> dict[str, Any]:
    """Functions, which chat nests."""
    fields: dict[str, Any] = {"parallel_tool_calls": body.parallel_tool_calls}
    if body.tools:
        fields["tools"] = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools)]
    choice = body.tool_choice
    if isinstance(choice, dict):
        choice = _tool_choice(choice, "tool_choice", unknown_fields)
    if body.tools or choice not in ("none", "auto"):
        fields["tool_choice"] = choice
    return fields


def _tool_choice(choice: dict[str, Any], where: str, unknown_fields: UnknownFields) -> dict[str, Any]:
    """Names of functions, which chat nests."""
    if choice.get("type") == "allowed_tools" and isinstance(choice.get("tools"), list):
        check_names(choice, ("type", "mode", "tools"), where, unknown_fields)
        named = [tool if isinstance(tool, dict) else {} for tool in choice["tools"]]
        allowed = {
            "mode": choice.get("mode"),
            "tools": [_tool_choice(tool, f"{where}.tools[{i}]", unknown_fields) for i, tool in enumerate(named)],
        }
        return {"type": "allowed_tools", "allowed_tools": allowed}
    _refuse_custom(choice, where)
    if choice.get("type") != "function":
        raise UnsupportedField("'tool_choice' may name functions only", param="tool_choice")
    check_names(choice, ("type", "name"), where, unknown_fields)
    return {"type": "function", "function": {"name": choice.get("name")}}


def _refuse_custom(tool: dict[str, Any], where: str) -> None:
    if tool.get("type") == "custom":
        path = f"{where}.type"
        raise UnsupportedField(f"{path!r} is not supported: {NO_CUSTOM_TOOLS}", param=path)


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    _refuse_custom(tool, where)
    if (kind := tool.get("type")) != "function":
        raise UnsupportedField(f"{where}: there is no hosted tool {str(kind)[:64]!r}, only functions", param=where)
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _reasoning(body: PromptBody, unknown_fields: UnknownFields) -> dict[str, Any]:
    reasoning = body.reasoning or {}
    check_names(reasoning, ("effort", *_SUMMARIES), "reasoning", unknown_fields)
    for name in _SUMMARIES:
        if reasoning.get(name) not in (None, "auto"):
            raise UnsupportedField(f"'reasoning.{name}': reasoning is shown whole, not in summary", param="reasoning")
    return {"reasoning_effort": reasoning["effort"]} if reasoning.get("effort") else {}
