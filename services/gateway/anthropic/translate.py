"""An Anthropic body as a chat body: `system` becomes the first turn, content blocks become parts, calls and results."""

from __future__ import annotations

from typing import Any

from services.gateway.anthropic.blocks import Turn, assistant_turn, blocks_of, system_parts, user_turns
from services.gateway.anthropic.schemas import MessagesBody, OutputConfig, PromptBody
from services.gateway.requests.body_reader import UnknownFields, check_names, validate
from services.gateway.schemas.chat import ChatBody
from shared.errors import InvalidRequest, UnsupportedField

CLIENT_WORDS = {
    "thinking_token_budget": "thinking",
    "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format",
    "stop": "stop_sequences",
}
"""For `in_words_of`."""

_FIELDS_OF_TOOLS = ("type", "name", "description", "input_schema", "strict", "cache_control")
_REFUSED_OF_TOOLS = ("defer_loading", "allowed_callers", "input_examples", "eager_input_streaming")


def chat_body(body: PromptBody, unknown_fields: UnknownFields) -> ChatBody:
    """The same prompt, and for `MessagesBody` the same wishes, as a chat request.

    Raises:
        InvalidRequest: A turn, block or field that cannot be served.
    """
    turns = _turns(body, unknown_fields)
    content: dict[str, Any] = {
        "model": body.model,
        "messages": turns,
        **_tools(body, unknown_fields),
        **_thinking(body, unknown_fields),
    }
    content |= {**_output(body), "chat_template_kwargs": body.chat_template_kwargs}
    if turns[-1]["role"] == "assistant":
        content |= {"continue_final_message": True, "add_generation_prompt": False}
    if isinstance(body, MessagesBody):
        user = body.metadata.user_id if body.metadata else None
        content |= {"max_tokens": body.max_tokens, "stream": body.stream, "stop": body.stop_sequences, "user": user}
        content |= {"temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k}
        content |= {"cache_salt": body.cache_salt, "priority": body.priority}
    return validate(content, ChatBody, unknown_fields)


def _turns(body: PromptBody, unknown_fields: UnknownFields) -> list[Turn]:
    turns: list[Turn] = []
    if body.system not in (None, "", []):
        turns.append({"role": "system", "content": system_parts(body.system, unknown_fields)})
    for index, message in enumerate(body.messages):
        where = f"messages.{index}.content"
        blocks = blocks_of(message.content, where, unknown_fields)
        said = (
            [assistant_turn(blocks, where)]
            if message.role == "assistant"
            else user_turns(blocks, where, unknown_fields)
        )
        if turns and said and turns[-1]["role"] == "user" == said[0]["role"]:
            turns[-1]["content"] += said.pop(0)["content"]  # Anthropic's API joins turns of one role
        turns += said
    return turns


def _tools(body: PromptBody, unknown_fields: UnknownFields) -> dict[str, Any]:
    tools = [_tool(tool, f"tools.{i}", unknown_fields) for i, tool in enumerate(body.tools or ())]
    fields: dict[str, Any] = {"tools": tools} if tools else {}
    choice = body.tool_choice
    if choice is None:
        return fields
    check_names(choice, ("type", "name", "disable_parallel_tool_use"), "tool_choice", unknown_fields)
    match choice.get("type"):
        case "auto" | "none" as same:
            fields["tool_choice"] = same if tools else None
        case "any":
            fields["tool_choice"] = "required"
        case "tool":
            fields["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
        case _:
            raise InvalidRequest("'tool_choice.type' must be auto, any, tool or none", param="tool_choice")
    if choice.get("disable_parallel_tool_use"):
        fields["parallel_tool_calls"] = False
    return fields


def _tool(tool: dict[str, Any], where: str, unknown_fields: UnknownFields) -> dict[str, Any]:
    if (kind := tool.get("type") or "custom") != "custom":
        raise UnsupportedField(f"{where}: there is no server tool {str(kind)[:64]!r}", param=where)
    if refused := next((name for name in _REFUSED_OF_TOOLS if tool.get(name)), None):
        raise UnsupportedField(f"'{where}.{refused}' is not supported: tools are all in the prompt", param=where)
    check_names(tool, (*_FIELDS_OF_TOOLS, *_REFUSED_OF_TOOLS), where, unknown_fields)
    function = {
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": tool.get("input_schema"),
    }
    return {"type": "function", "function": {**function, "strict": tool.get("strict")}}


def _output(body: PromptBody) -> dict[str, Any]:
    """`high` is the effort that Anthropic's API has without the field, so it asks for nothing."""
    config = body.output_config or OutputConfig()
    if config.format is not None and body.output_format is not None:
        raise InvalidRequest("'output_format' is the older name of 'output_config.format'", param="output_format")
    fields: dict[str, Any] = {"reasoning_effort": None if config.effort == "high" else config.effort}
    if (wanted := config.format or body.output_format) is not None:
        schema = {"name": "output", "schema": wanted.json_schema}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields


def _thinking(body: PromptBody, unknown_fields: UnknownFields) -> dict[str, Any]:
    check_names(body.thinking or {}, ("type", "budget_tokens", "display"), "thinking", unknown_fields)
    match (body.thinking or {}).get("type"):
        case None | "adaptive":
            return {}
        case "disabled":
            return {"include_reasoning": False}
        case "enabled":
            return {"thinking_token_budget": (body.thinking or {}).get("budget_tokens")}
        case _:
            raise InvalidRequest("'thinking.type' must be enabled, adaptive or disabled", param="thinking")
