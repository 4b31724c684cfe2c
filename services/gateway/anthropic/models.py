"""`/v1/models` as Anthropic's clients ask for it: with the header `anthropic-version`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

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
    for name, wanted in (("after_id", after_id), ("before_id", before_id)):
        if wanted and wanted not in ids:
            raise InvalidRequest(f"'{name}': there is no model {wanted[:64]!r} in the list", param=name)
    if before_id:
        found = cards[: ids.index(before_id)]
        shown, has_more = found[-limit:], len(found) > limit
    else:
        found = cards[ids.index(after_id) + 1 :] if after_id else cards
        shown, has_more = found[:limit], len(found) > limit
    data = [model_info(card) for card in shown]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return ModelPage(data=data, has_more=has_more, first_id=first, last_id=last)
