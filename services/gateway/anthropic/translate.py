"""An Anthropic body as a chat body: `system` becomes the first turn, content blocks become parts."""

from __future__ import annotations

from typing import Any

from services.gateway.anthropic.schemas import NO_THINKING, NO_TOOLS, Message, MessagesBody, PromptBody
from services.gateway.body_reader import UnknownFields, check_extra, validate
from services.gateway.schemas.chat import ChatBody
from shared.errors import InvalidRequest, UnsupportedField

_REFUSED_BLOCKS = {
    "image": "the model reads text only",
    "document": "the model reads text only; send the document's text as a text block",
    "search_result": "the model reads text only; send the result's text as a text block",
    "tool_use": NO_TOOLS,
    "tool_result": NO_TOOLS,
    "thinking": NO_THINKING,
    "redacted_thinking": NO_THINKING,
}


def chat_body(body: PromptBody, unknown_fields: UnknownFields) -> ChatBody:
    """The same prompt, and for `MessagesBody` the same wishes, as a chat request.

    Raises:
        InvalidRequest: A turn, block or field that cannot be served.
    """
    content: dict[str, Any] = {"model": body.model, "messages": _turns(body, unknown_fields)}
    if isinstance(body, MessagesBody):
        if body.metadata is not None:
            check_extra(body.metadata, {}, unknown_fields, where="metadata.")
        user = body.metadata.user_id if body.metadata else None
        content |= {"max_tokens": body.max_tokens, "stream": body.stream, "stop": body.stop_sequences, "user": user}
        content |= {"temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k}
    return validate(content, ChatBody, unknown_fields)


def _turns(body: PromptBody, unknown_fields: UnknownFields) -> list[dict[str, object]]:
    turns: list[dict[str, Any]] = []
    if body.system not in (None, "", []):
        turns.append({"role": "system", "content": _parts(body.system, "system", unknown_fields)})
    for index, message in enumerate(body.messages):
        parts = _turn_parts(message, index, unknown_fields)
        if turns and turns[-1]["role"] == message.role:
            turns[-1]["content"] += parts  # Anthropic's API joins turns of one role
        else:
            turns.append({"role": message.role, "content": parts})
    if turns[-1]["role"] == "assistant":
        raise UnsupportedField(
            "the last message must be the user's: continuing a given beginning of the assistant's turn is not built",
            param=f"messages.{len(body.messages) - 1}.role",
        )
    return turns


def _turn_parts(message: Message, index: int, unknown_fields: UnknownFields) -> list[dict[str, object]]:
    where = f"messages.{index}"
    check_extra(message, {}, unknown_fields, where=f"{where}.")
    return _parts(message.content, f"{where}.content", unknown_fields)


def _parts(content: object, where: str, unknown_fields: UnknownFields) -> list[dict[str, object]]:
    """Text, or blocks, as chat parts."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise InvalidRequest(f"{where} must be text or a non-empty list of content blocks", param=where)
    return [_part(block, f"{where}.{i}", unknown_fields) for i, block in enumerate(content)]


def _part(block: object, where: str, unknown_fields: UnknownFields) -> dict[str, object]:
    kind = block.get("type") if isinstance(block, dict) else None
    if isinstance(kind, str) and kind in _REFUSED_BLOCKS:
        raise UnsupportedField(f"{where}: a {kind!r} block is not supported: {_REFUSED_BLOCKS[kind]}", param=where)
    if not isinstance(block, dict) or kind != "text" or not isinstance(block.get("text"), str):
        raise InvalidRequest(f'{where} must be {{"type": "text", "text": ...}}', param=where)
    if block.get("citations"):
        raise UnsupportedField(f"{where}.citations: there are no citations", param=f"{where}.citations")
    extra = sorted(set(block) - {"type", "text", "cache_control", "citations"})
    if extra and unknown_fields == "refuse":
        raise InvalidRequest(f"unknown field {where}.{extra[0]!r}"[:200], param=f"{where}.{extra[0]}"[:200])
    return {"type": "text", "text": block["text"]}
