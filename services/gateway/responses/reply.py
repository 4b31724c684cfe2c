"""The response object, and the events that tell how it comes to be.

created, (queued), in_progress, output_item.added, content_part.added, output_text.delta..., output_text.done,
content_part.done, output_item.done, completed | incomplete | failed | cancelled
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

import orjson

from services.gateway.replies.choice_text import Delta
from services.gateway.replies.logprobs import TokenNames
from services.gateway.requests.request import GenerationRequest
from services.gateway.responses.input_items import Item
from services.gateway.responses.output import OutputItems
from services.gateway.responses.schemas import ResponseBody
from services.gateway.sessions.generation import Usage
from services.gateway.syntax.families import ToolFamily
from shared.errors import TandemError, Unavailable
from shared.tokenization.tokenizer import Tokenizer


class ResponseBuilder:
    """One response from its request to its end. Mutable; owned by the run that makes it.

    Attributes:
        events: All events so far, if they are wanted; the position is the sequence number.
        is_stored: It is to be kept; false as soon as it could not be.
    """

    def __init__(self, body: ResponseBody, request: GenerationRequest, tokenizer: Tokenizer) -> None:
        self.response_id = f"resp_{secrets.token_hex(24)}"
        self.events: list[bytes] = []
        self.is_stored = body.store is not False
        self.is_background = bool(body.background)
        self._body = body
        self._finish_reason: str | None = None
        self._stopped: TandemError | None = None
        self._object = _new_object(self.response_id, body, request)
        family = (request.syntax.tools if request.syntax is not None else None) or ToolFamily.HERMES
        names = TokenNames(tokenizer, by_id=False)
        self._items = OutputItems(self._event, names, family, has_logprobs=body.wants_logprobs)

    @property
    def status(self) -> str:
        """As the object tells it."""
        return str(self._object["status"])

    @property
    def output(self) -> list[Item]:
        """The output items."""
        output: list[Item] = self._object["output"]
        return output

    def as_json(self) -> dict[str, Any]:
        """The response object as it stands."""
        return {**self._object, "store": self.is_stored}

    def queued(self) -> None:
        """It waits to be started."""
        self._object["status"] = "queued"
        self._event("response.created", response=self.as_json())
        self._event("response.queued", response=self.as_json())

    def begin(self) -> None:
        """It is being made."""
        self._object["status"] = "in_progress"
        if not self.events:
            self._event("response.created", response=self.as_json())
        self._event("response.in_progress", response=self.as_json())

    def add(self, deltas: Sequence[Delta]) -> None:
        """More of the text."""
        for delta in deltas:
            self._items.add(delta)
            self._finish_reason = delta.finish_reason or self._finish_reason

    def end(self, usage: Usage) -> None:
        """All was said."""
        is_cut = self._finish_reason == "length"
        self._object["usage"] = _usage(usage)
        self._object["incomplete_details"] = {"reason": "max_output_tokens"} if is_cut else None
        self._close("incomplete" if is_cut else "completed")

    def fail(self, error: TandemError) -> None:
        """It will not be finished."""
        self._object["error"] = {"code": "server_error", "message": f"{error.code}: {error.message}"}
        self._close("failed")

    def cancel(self) -> None:
        """It was ended from outside: by its client, or by `stop`."""
        if self._stopped is not None:
            self.fail(self._stopped)
        else:
            self._close("cancelled")

    def stop(self, reason: str) -> None:
        """When it is cancelled now, that is no wish of its client."""
        self._stopped = Unavailable(reason)

    def _close(self, status: str) -> None:
        self._items.close("completed" if status == "completed" else "incomplete")
        self._object["output"] = self._items.items
        self._object["status"] = status
        self._object["completed_at"] = int(time.time()) if status == "completed" else None

    def last_event(self) -> None:
        """Tells how it ended; after it was stored, because the event says whether it was."""
        self._event(f"response.{self.status}", response=self.as_json())

    def _event(self, kind: str, **fields: object) -> None:
        if self._body.stream:
            body = orjson.dumps({"type": kind, "sequence_number": len(self.events), **fields})
            self.events.append(b"event: %b\ndata: %b\n\n" % (kind.encode(), body))


def _new_object(response_id: str, body: ResponseBody, request: GenerationRequest) -> dict[str, Any]:
    return {
        "id": response_id,
        "object": "response",
        "created_at": request.created,
        "completed_at": None,
        "status": "queued",
        "background": bool(body.background),
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "model": body.model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None, **(body.reasoning or {})},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "temperature": request.sampling.temperature,
        "text": {"format": (body.text and body.text.format) or {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": [{"strict": None, "parameters": None, **tool} for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": request.sampling.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _usage(usage: Usage) -> dict[str, object]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens or 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
