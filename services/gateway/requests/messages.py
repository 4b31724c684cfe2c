"""Chat messages as clients send them to messages as chat templates read them."""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from services.gateway.requests.body_reader import MAX_DEPTH, UnknownFields, check_names, depth_of
from services.gateway.schemas.chat import ChatMessage, MessageToolCall
from shared.errors import InvalidRequest, UnsupportedField

_TEXT_FIELDS = ("type", "text", "prompt_cache_breakpoint", "cache_control")
"""The last two, OpenAI's and Anthropic's, are moot: every prompt's KV is cached by content."""


def template_messages(messages: Sequence[ChatMessage], unknown_fields: UnknownFields) -> list[dict[str, object]]:
    """The messages as chat templates read them: content as one text, `developer` under its older name `system`.

    Raises:
        InvalidRequest: A role, part or field that cannot be served.
    """
    return [_template_message(i, message, unknown_fields) for i, message in enumerate(messages)]


def _template_message(index: int, message: ChatMessage, unknown_fields: UnknownFields) -> dict[str, object]:
    where = f"messages[{index}]"
    if message.role == "function":
        raise UnsupportedField(f"{where}.role: 'function' was replaced by 'tool'", param=f"{where}.role")
    if message.role != "assistant" and message.tool_calls:
        raise InvalidRequest(f"{where}.tool_calls: only the assistant calls tools", param=f"{where}.tool_calls")
    role = "system" if message.role == "developer" else message.role
    content = message.content
    if content is None and message.tool_calls:
        content = ""  # the calls are all that was said
    rendered: dict[str, object] = {"role": role, "content": _content_text(content, f"{where}.content", unknown_fields)}
    if message.name is not None:
        rendered["name"] = message.name
    if message.tool_call_id is not None:
        rendered["tool_call_id"] = message.tool_call_id
    if reasoning := message.reasoning_content or message.reasoning:
        rendered["reasoning_content"] = reasoning
    if message.tool_calls:
        rendered["tool_calls"] = [
            _template_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)
        ]
    return rendered


def _template_call(call: MessageToolCall, where: str) -> dict[str, object]:
    """Templates want the arguments as an object."""
    try:
        arguments = orjson.loads(call.function.arguments or "{}")
    except orjson.JSONDecodeError:
        arguments = None
    if not isinstance(arguments, dict):
        path = f"{where}.function.arguments"
        raise InvalidRequest(f"{path} must be a JSON object in a string", param=path)
    if (depth := depth_of(arguments)) > MAX_DEPTH:
        path = f"{where}.function.arguments"
        raise InvalidRequest(f"{path} is {depth} levels deep, at most {MAX_DEPTH} are read", param=path)
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _content_text(content: object, where: str, unknown_fields: UnknownFields) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise InvalidRequest(f"{where} must be text or a non-empty list of parts", param=where)
    texts: list[str] = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            check_names(part, _TEXT_FIELDS, f"{where}[{i}]", unknown_fields)
            texts.append(part["text"])
        elif kind in ("image_url", "input_audio", "file", "video_url"):
            raise UnsupportedField(f"{where}[{i}]: the model reads text only, not {kind!r}", param=f"{where}[{i}]")
        else:
            raise InvalidRequest(f'{where}[{i}] must be {{"type": "text", "text": ...}}', param=f"{where}[{i}]")
    return "\n".join(texts)
