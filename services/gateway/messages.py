"""Chat messages as clients send them to messages as chat templates read them."""

from __future__ import annotations

from collections.abc import Sequence

from services.gateway.body_reader import UnknownFields, check_extra
from services.gateway.schemas.chat import ChatMessage
from shared.errors import InvalidRequest, UnsupportedField


def template_messages(messages: Sequence[ChatMessage], unknown_fields: UnknownFields) -> list[dict[str, object]]:
    """The messages as chat templates read them: content as one text, `developer` under its older name `system`.

    Raises:
        InvalidRequest: A role, part or field that cannot be served.
    """
    return [_template_message(i, message, unknown_fields) for i, message in enumerate(messages)]


def _template_message(index: int, message: ChatMessage, unknown_fields: UnknownFields) -> dict[str, object]:
    where = f"messages[{index}]"
    if message.role in ("tool", "function"):
        raise UnsupportedField(f"{where}.role: tool calling is not built", param=f"{where}.role")
    check_extra(message, ChatMessage.refused, unknown_fields, where=f"{where}.")
    role = "system" if message.role == "developer" else message.role
    rendered: dict[str, object] = {"role": role, "content": _content_text(message.content, f"{where}.content")}
    if message.name is not None:
        rendered["name"] = message.name
    return rendered


def _content_text(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise InvalidRequest(f"{where} must be text or a non-empty list of parts", param=where)
    texts: list[str] = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image_url", "input_audio", "file", "video_url"):
            raise UnsupportedField(f"{where}[{i}]: the model reads text only, not {kind!r}", param=f"{where}[{i}]")
        else:
            raise InvalidRequest(f'{where}[{i}] must be {{"type": "text", "text": ...}}', param=f"{where}[{i}]")
    return "\n".join(texts)
