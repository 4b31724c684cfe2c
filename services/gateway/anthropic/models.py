"""`/v1/models` as Anthropic's clients ask for it: with the header `anthropic-version`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

from services.gateway.pages import page
from services.gateway.schemas.replies import ModelCard
from services.gateway.schemas.reply import Reply
from shared.errors import InvalidRequest


class ModelInfo(Reply):
    """A model that is served. `created_at` is RFC 3339; limits are in tokens."""

    type: Literal["model"] = "model"
    id: str
    display_name: str
    created_at: str
    max_input_tokens: int
    max_tokens: int


class ModelPage(Reply):
    """Models, the newest first."""

    data: list[ModelInfo]
    has_more: bool
    first_id: str | None
    last_id: str | None


def model_info(card: ModelCard) -> ModelInfo:
    """The same model in Anthropic's words."""
    return ModelInfo(
        id=card.id,
        display_name=card.id,
        created_at=datetime.fromtimestamp(card.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        max_input_tokens=card.max_model_len,
        max_tokens=card.max_model_len,
    )


def model_page(cards: Sequence[ModelCard], limit: int, after_id: str, before_id: str) -> ModelPage:
    """So many models after or before a given one.

    Raises:
        InvalidRequest: There is no such model, or both are given.
    """
    if after_id and before_id:
        raise InvalidRequest("'after_id' and 'before_id' exclude each other", param="before_id")
    ids = [card.id for card in cards]
    name, unknown = ("before_id" if before_id else "after_id"), "there is no model {} in the list"
    if before_id:  # the page after it, seen from the other end
        cards, ids = cards[::-1], ids[::-1]
    shown, has_more = page(cards, ids, limit, after_id or before_id, param=name, unknown=f"'{name}': {unknown}")
    if before_id:
        shown.reverse()
    data = [model_info(card) for card in shown]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return ModelPage(data=data, has_more=has_more, first_id=first, last_id=last)
