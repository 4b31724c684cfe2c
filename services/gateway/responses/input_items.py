"""Input items: checked, given ids, and made into the turns of a chat."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from services.gateway.requests.body_reader import UnknownFields, check_names
from shared.errors import InvalidRequest, UnsupportedField

Item = dict[str, Any]

_ROLES = ("user", "assistant", "system", "developer")
_REFUSED_PARTS = ("input_image", "input_file", "input_audio")
_FIELDS = {
    "message": {"type", "role", "content", "id", "status", "phase"},
    "function_call": {"type", "id", "call_id", "name", "arguments", "status", "caller", "namespace"},
    "function_call_output": {"type", "id", "call_id", "output", "status", "caller"},
    "reasoning": {"type", "id", "summary", "content", "status", "encrypted_content"},
}
_PART_FIELDS = {
    "input_text": {"type", "text", "prompt_cache_breakpoint"},
    "output_text": {"type", "text", "annotations", "logprobs"},
}
_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def input_items(value: object, unknown_fields: UnknownFields) -> list[Item]:
    """What `input` says, as items with ids.

    Raises:
        InvalidRequest: It is neither text nor a list of items that can be served.
    """
    if isinstance(value, str):
        return [_with_id("message", {"role": "user", "content": [{"type": "input_text", "text": value}]})]
    if not isinstance(value, list) or not value:
        raise InvalidRequest("'input' must be text or a non-empty list of items", param="input")
    return [_item(item, f"input[{i}]", unknown_fields) for i, item in enumerate(value)]


def chat_turns(items: Sequence[Item]) -> list[Item]:
    """The items as messages of a chat: reasoning and calls belong to the assistant's turn beside them."""
    turns: list[Item] = []
    reasoning = ""
    for item in items:
        match item["type"]:
            case "reasoning":
                reasoning += "".join(part["text"] for part in item.get("content") or ())
                continue
            case "function_call_output":
                turns.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
            case "function_call":
                function = {"name": item["name"], "arguments": item["arguments"]}
                call = {"id": item["call_id"], "type": "function", "function": function}
                if not turns or turns[-1]["role"] != "assistant":
                    turns.append({"role": "assistant", "content": None})
                turns[-1].setdefault("tool_calls", []).append(call)
            case _:
                parts = [{"type": "text", "text": part["text"]} for part in item["content"]]
                turns.append({"role": item["role"], "content": parts})
        if reasoning and turns[-1]["role"] == "assistant":
            turns[-1]["reasoning_content"] = reasoning
        reasoning = ""
    return turns


def _item(item: object, where: str, unknown_fields: UnknownFields) -> Item:
    if not isinstance(item, dict):
        raise InvalidRequest(f"{where} must be an object", param=where)
    kind = item.get("type", "message")
    if kind == "item_reference":
        raise UnsupportedField(
            f"{where}: items are not stored by themselves; send the item, or 'previous_response_id'", param=where
        )
    if not isinstance(kind, str) or kind not in _FIELDS:
        known = ", ".join(_FIELDS)
        raise InvalidRequest(f"{where}.type is {str(kind)[:64]!r}, known are {known}", param=f"{where}.type")
    check_names(item, _FIELDS[kind], where, unknown_fields)
    checked = {
        "message": _message,
        "function_call": _call,
        "function_call_output": _call_output,
        "reasoning": _reasoning,
    }[kind](item, where, unknown_fields)
    return _with_id(kind, checked, item.get("id"))


def _with_id(kind: str, item: Item, item_id: object = None) -> Item:
    name = item_id[:128] if isinstance(item_id, str) and item_id else f"{_PREFIXES[kind]}_{secrets.token_hex(16)}"
    return {"id": name, "type": kind, "status": "completed", **item}


def _message(item: Item, where: str, unknown_fields: UnknownFields) -> Item:
    role, content = item.get("role"), item.get("content")
    if role not in _ROLES:
        raise InvalidRequest(f"{where}.role must be one of {', '.join(_ROLES)}", param=f"{where}.role")
    if isinstance(content, str):
        kind = "output_text" if role == "assistant" else "input_text"
        return {"role": role, "content": [{"type": kind, "text": content}]}
    return {"role": role, "content": _parts(content, f"{where}.content", unknown_fields)}


def _call(item: Item, where: str, _: UnknownFields) -> Item:
    return {name: _text(item, name, where) for name in ("call_id", "name", "arguments")}


def _call_output(item: Item, where: str, unknown_fields: UnknownFields) -> Item:
    output = item.get("output")
    if isinstance(output, list):
        output = "\n".join(str(part["text"]) for part in _parts(output, f"{where}.output", unknown_fields))
    return {"call_id": _text(item, "call_id", where), "output": _text({"output": output}, "output", where)}


def _reasoning(item: Item, where: str, _: UnknownFields) -> Item:
    content = item.get("content") or []
    is_text = isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content)
    if not is_text:
        raise InvalidRequest(f"{where}.content must be a list of reasoning texts", param=f"{where}.content")
    return {"summary": [], "content": [{"type": "reasoning_text", "text": part["text"]} for part in content]}


def _text(item: Item, name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise InvalidRequest(f"{where}.{name} must be text", param=f"{where}.{name}")
    return value


def _parts(content: object, where: str, unknown_fields: UnknownFields) -> list[Item]:
    if not isinstance(content, list) or not content:
        raise InvalidRequest(f"{where} must be text or a non-empty list of parts", param=where)
    return [_part(part, f"{where}[{i}]", unknown_fields) for i, part in enumerate(content)]


def _part(part: object, where: str, unknown_fields: UnknownFields) -> Item:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _REFUSED_PARTS:
        raise UnsupportedField(f"{where}: the model reads text only, not {kind!r}", param=where)
    if not isinstance(part, dict) or kind not in ("input_text", "output_text") or not isinstance(part.get("text"), str):
        raise InvalidRequest(f'{where} must be {{"type": "input_text", "text": ...}}', param=where)
    check_names(part, _PART_FIELDS[kind], where, unknown_fields)
    kept = {"type": kind, "text": part["text"]}
    return {**kept, "annotations": []} if kind == "output_text" else kept
