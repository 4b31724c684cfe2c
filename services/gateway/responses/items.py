"""Input and output items, and the chat that they make up."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from services.gateway.body_reader import UnknownFields, check_extra, validate
from services.gateway.responses.schemas import LOGPROBS, NO_TOOLS, PromptBody, ResponseBody
from services.gateway.schemas.chat import ChatBody
from shared.errors import InvalidRequest, UnsupportedField

Item = dict[str, Any]

_ROLES = ("user", "assistant", "system", "developer")
_REFUSED_ITEMS = {
    "function_call": NO_TOOLS,
    "function_call_output": NO_TOOLS,
    "reasoning": "the model's reasoning is not told apart from its text",
    "item_reference": "items are not stored by themselves; send the item, or 'previous_response_id'",
}
_REFUSED_PARTS = ("input_image", "input_file", "input_audio")
_METADATA_KEYS, _KEY_CHARS, _VALUE_CHARS = 16, 64, 512


def input_items(value: object, unknown_fields: UnknownFields) -> list[Item]:
    """What `input` says, as message items with ids.

    Raises:
        InvalidRequest: It is neither text nor a list of items that can be served.
    """
    if isinstance(value, str):
        return [message_item("user", [{"type": "input_text", "text": value}])]
    if not isinstance(value, list) or not value:
        raise InvalidRequest("'input' must be text or a non-empty list of items", param="input")
    return [_item(item, f"input[{i}]", unknown_fields) for i, item in enumerate(value)]


def message_item(role: str, content: list[dict[str, object]], *, item_id: str = "") -> Item:
    """A message that is complete."""
    item_id = item_id or f"msg_{secrets.token_hex(16)}"
    return {"id": item_id, "type": "message", "role": role, "status": "completed", "content": content}


def chat_body(body: PromptBody, items: Sequence[Item], unknown_fields: UnknownFields) -> ChatBody:
    """The chat that the items and instructions make up.

    Raises:
        InvalidRequest: A field that cannot be served.
    """
    turns: list[Item] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    turns += [{"role": item["role"], "content": _chat_content(item["content"])} for item in items]
    content: dict[str, Any] = {"model": body.model, "messages": turns}
    if body.text is not None:
        check_extra(body.text, body.text.refused, unknown_fields, where="text.")
        content["response_format"] = _response_format(body.text.format)
    if isinstance(body, ResponseBody):
        content |= {"temperature": body.temperature, "top_p": body.top_p, "stream": body.stream}
        content |= {"max_completion_tokens": body.max_output_tokens, "user": body.user}
        if body.wants_logprobs:
            content |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
        _check_options(body, unknown_fields)
    return validate(content, ChatBody, unknown_fields)


def _check_options(body: ResponseBody, unknown_fields: UnknownFields) -> None:
    if body.stream_options is not None:
        check_extra(body.stream_options, body.stream_options.refused, unknown_fields, where="stream_options.")
    for name in body.include or ():
        if name != LOGPROBS:
            raise UnsupportedField(f"'include': {name[:64]!r} is not supported, only {LOGPROBS!r} is", param="include")
    metadata = body.metadata or {}
    if len(metadata) > _METADATA_KEYS:
        raise InvalidRequest(f"'metadata' has {len(metadata)} keys, at most {_METADATA_KEYS}", param="metadata")
    for key, value in metadata.items():
        if len(key) > _KEY_CHARS or len(value) > _VALUE_CHARS:
            raise InvalidRequest(
                f"'metadata': a key of {len(key)} and a value of {len(value)} characters, "
                f"at most {_KEY_CHARS} and {_VALUE_CHARS}",
                param="metadata",
            )
    if body.background and body.store is False:
        raise InvalidRequest("'background' needs 'store': the response is read from there later", param="store")


def _response_format(wanted: dict[str, object] | None) -> dict[str, object] | None:
    """`text.format` as chat's `response_format`, which nests what is flat here."""
    if wanted is None or wanted.get("type") != "json_schema":
        return wanted
    return {"type": "json_schema", "json_schema": {k: v for k, v in wanted.items() if k != "type"}}


def _item(item: object, where: str, unknown_fields: UnknownFields) -> Item:
    if not isinstance(item, dict):
        raise InvalidRequest(f"{where} must be an object", param=where)
    kind = item.get("type", "message")
    if isinstance(kind, str) and kind in _REFUSED_ITEMS:
        raise UnsupportedField(f"{where}: a {kind!r} item is not supported: {_REFUSED_ITEMS[kind]}", param=where)
    if kind != "message":
        raise InvalidRequest(f"{where}.type is {str(kind)[:64]!r}, only 'message' is known", param=f"{where}.type")
    role = item.get("role")
    if role not in _ROLES:
        raise InvalidRequest(f"{where}.role must be one of {', '.join(_ROLES)}", param=f"{where}.role")
    extra = sorted(set(item) - {"type", "role", "content", "id", "status", "phase"})
    if extra and unknown_fields == "refuse":
        raise InvalidRequest(f"unknown field {where}.{str(extra[0])[:64]!r}", param=where)
    content = item.get("content")
    if isinstance(content, str):
        parts: list[dict[str, object]] = [
            {"type": "output_text" if role == "assistant" else "input_text", "text": content}
        ]
    elif isinstance(content, list) and content:
        parts = [_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
    else:
        raise InvalidRequest(f"{where}.content must be text or a non-empty list of parts", param=f"{where}.content")
    item_id = item.get("id")
    return message_item(str(role), parts, item_id=item_id[:128] if isinstance(item_id, str) else "")


def _part(part: object, where: str) -> dict[str, object]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _REFUSED_PARTS:
        raise UnsupportedField(f"{where}: the model reads text only, not {kind!r}", param=where)
    if not isinstance(part, dict) or kind not in ("input_text", "output_text") or not isinstance(part.get("text"), str):
        raise InvalidRequest(f'{where} must be {{"type": "input_text", "text": ...}}', param=where)
    kept: dict[str, object] = {"type": kind, "text": part["text"]}
    return {**kept, "annotations": []} if kind == "output_text" else kept


def _chat_content(parts: Sequence[Item]) -> list[dict[str, object]]:
    return [{"type": "text", "text": part["text"]} for part in parts]
