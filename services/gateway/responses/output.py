"""Output items while they come to be: reasoning, a message, calls; each with the events that tell it.

reasoning      output_item.added, reasoning_text.delta..., reasoning_text.done, output_item.done
message        output_item.added, content_part.added, output_text.delta..., output_text.done, content_part.done,
output_item.done
function_call  output_item.added, function_call_arguments.delta..., function_call_arguments.done, output_item.done
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

from services.gateway.replies.choice_text import Delta, TokenEntry
from services.gateway.replies.logprobs import TokenNames, chat_logprobs
from services.gateway.syntax.families import ToolFamily

Item = dict[str, Any]
Tell = Callable[..., None]

_PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}


class OutputItems:
    """The items of one response, in the order in which they begin. The last one may be open.

    Args:
        tell: Takes the kind of an event and its fields.
    """

    def __init__(self, tell: Tell, names: TokenNames, family: ToolFamily, *, has_logprobs: bool) -> None:
        self.items: list[Item] = []
        self._tell = tell
        self._names = names
        self._family = family
        self._has_logprobs = has_logprobs
        self._is_open = False
        self._pieces: list[str] = []
        self._tokens: list[TokenEntry] = []

    def add(self, delta: Delta) -> None:
        """More of what is said."""
        if delta.reasoning:
            self._enter("reasoning")
            self._pieces.append(delta.reasoning)
            self._part_event("response.reasoning_text.delta", delta=delta.reasoning)
        if delta.text or (delta.tokens and self._has_logprobs):
            self._enter("message")
            self._pieces.append(delta.text)
            self._tokens += delta.tokens
            self._part_event("response.output_text.delta", delta=delta.text, logprobs=self._logprobs(delta.tokens))
        for call in delta.calls:
            if call.name is not None:
                self.close("completed")
                self._begin("function_call", call_id=self._family.new_call_id(), name=call.name, arguments="")
            if call.arguments:
                self._pieces.append(call.arguments)
                self._event("response.function_call_arguments.delta", delta=call.arguments)

    def close(self, status: str) -> None:
        """Ends the open item, if there is one."""
        if not self._is_open:
            return
        self._is_open = False
        item, text = self.items[-1], "".join(self._pieces)
        item["status"] = status
        match item["type"]:
            case "message":
                part = _text_part(text, self._logprobs(self._tokens))
                item["content"] = [part]
                self._part_event("response.output_text.done", text=text, logprobs=part["logprobs"])
                self._part_event("response.content_part.done", part=part)
            case "reasoning":
                item["content"] = [{"type": "reasoning_text", "text": text}]
                self._part_event("response.reasoning_text.done", text=text)
            case _:
                item["arguments"] = text
                self._event("response.function_call_arguments.done", arguments=text, name=item["name"])
        self._tell("response.output_item.done", output_index=len(self.items) - 1, item=item)

    def _enter(self, kind: str) -> None:
        """Goes on with the open item if it is of that kind, else begins one."""
        if not self._is_open or self.items[-1]["type"] != kind:
            self.close("completed")
            self._begin(kind, **({"role": "assistant", "content": []} if kind == "message" else {"summary": []}))

    def _begin(self, kind: str, **fields: object) -> None:
        item_id = f"{_PREFIXES[kind]}_{secrets.token_hex(24)}"
        item = {"id": item_id, "type": kind, "status": "in_progress", **fields}
        self.items.append(item)
        self._is_open = True
        self._pieces, self._tokens = [], []
        self._tell("response.output_item.added", output_index=len(self.items) - 1, item=item)
        if kind == "message":
            self._part_event("response.content_part.added", part=_text_part("", []))

    def _logprobs(self, tokens: Sequence[TokenEntry]) -> list[object]:
        content = chat_logprobs(tokens, self._names)["content"] if self._has_logprobs else []
        return content if isinstance(content, list) else []

    def _part_event(self, kind: str, **fields: object) -> None:
        self._event(kind, content_index=0, **fields)

    def _event(self, kind: str, **fields: object) -> None:
        self._tell(kind, item_id=self.items[-1]["id"], output_index=len(self.items) - 1, **fields)


def _text_part(text: str, logprobs: list[object]) -> Item:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
