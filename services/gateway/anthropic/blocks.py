"""Content blocks of a turn, as parts of chat turns: text, thinking, tool calls and their results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from services.gateway.requests.body_reader import UnknownFields, check_names
from shared.errors import InvalidRequest, UnsupportedField

Block = dict[str, Any]
Turn = dict[str, Any]

_REFUSED = {
    "image": "the model reads text only",
    "document": "the model reads text only; send the document's text as a text block",
    "search_result": "the model reads text only; send the result's text as a text block",
    "redacted_thinking": "no reply of this server has one",
}
_FIELDS = {
    "text": {"type", "text", "cache_control", "citations"},
    "thinking": {"type", "thinking", "signature"},
    "tool_use": {"type", "id", "name", "input", "cache_control", "caller"},
    "tool_result": {"type", "tool_use_id", "content", "is_error", "cache_control"},
}


def blocks_of(content: object, where: str, unknown_fields: UnknownFields) -> list[Block]:
    """Text or blocks as blocks, each of a known type.

    Raises:
        InvalidRequest: One is not.
    """
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise InvalidRequest(f"{where} must be text or a non-empty list of content blocks", param=where)
    return [_checked(block, f"{where}.{i}", unknown_fields) for i, block in enumerate(content)]


def user_turns(blocks: list[Block], where: str, unknown_fields: UnknownFields) -> list[Turn]:
    """Results of tools as turns of their own, then what the user says."""
    turns: list[Turn] = []
    parts: list[Block] = []
    for index, block in enumerate(blocks):
        if block["type"] == "tool_result":
            turns.append(_result_turn(block, f"{where}.{index}", unknown_fields))
        elif block["type"] == "text":
            parts.append(_part(block))
        else:
            raise InvalidRequest(f"{where}.{index}: a {block['type']!r} block is the assistant's", param=where)
    return [*turns, {"role": "user", "content": parts}] if parts else turns


def assistant_turn(blocks: list[Block], where: str) -> Turn:
    """What the assistant thought, said and called."""
    turn: Turn = {"role": "assistant", "content": []}
    for index, block in enumerate(blocks):
        match block["type"]:
            case "text":
                turn["content"].append(_part(block))
            case "thinking":
                turn["reasoning_content"] = turn.get("reasoning_content", "") + block["thinking"]
            case "tool_use":
                function = {"name": block["name"], "arguments": orjson.dumps(block["input"]).decode()}
                turn.setdefault("tool_calls", []).append({"id": block["id"], "type": "function", "function": function})
            case other:
                raise InvalidRequest(f"{where}.{index}: a {other!r} block is the user's", param=f"{where}.{index}")
    if not turn["content"]:
        turn["content"] = None if "tool_calls" in turn else ""
    return turn


def system_parts(content: object, unknown_fields: UnknownFields) -> list[Block]:
    """`system`: text only."""
    blocks = blocks_of(content, "system", unknown_fields)
    for index, block in enumerate(blocks):
        if block["type"] != "text":
            raise InvalidRequest(f"system.{index} must be a text block", param=f"system.{index}")
    return [_part(block) for block in blocks]


def _result_turn(block: Block, where: str, unknown_fields: UnknownFields) -> Turn:
    content = block.get("content")
    parts = blocks_of(content, f"{where}.content", unknown_fields) if content not in (None, []) else []
    if any(part["type"] != "text" for part in parts):
        raise UnsupportedField(f"{where}.content: the model reads text only", param=f"{where}.content")
    text = "\n".join(part["text"] for part in parts)
    return {"role": "tool", "tool_call_id": block["tool_use_id"], "content": text}


def _part(block: Block) -> Block:
    return {"type": "text", "text": block["text"]}


def _checked(block: object, where: str, unknown_fields: UnknownFields) -> Block:
    kind = block.get("type") if isinstance(block, dict) else None
    if isinstance(kind, str) and kind in _REFUSED:
        raise UnsupportedField(f"{where}: a {kind!r} block is not supported: {_REFUSED[kind]}", param=where)
    if not isinstance(block, dict) or not isinstance(kind, str) or kind not in _FIELDS or not _is_whole(kind, block):
        raise InvalidRequest(f'{where} must be {{"type": "text", "text": ...}}, or a tool block', param=where)
    if block.get("citations"):
        raise UnsupportedField(f"{where}.citations: there are no citations", param=f"{where}.citations")
    check_names(block, _FIELDS[kind], where, unknown_fields)
    return block


def _is_whole(kind: str, block: Mapping[str, object]) -> bool:
    texts = {"text": ("text",), "thinking": ("thinking",), "tool_use": ("id", "name"), "tool_result": ("tool_use_id",)}
    has_input = kind != "tool_use" or isinstance(block.get("input"), dict)
    return has_input and all(isinstance(block.get(name), str) for name in texts[kind])
