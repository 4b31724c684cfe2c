"""`/v1/models`: the one model that is served, and what is known of it, in OpenAI's shape or in Anthropic's."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from fastapi.params import Query
from starlette.requests import Request
from starlette.responses import Response

from services.gateway.access.caller import current_caller
from services.gateway.anthropic.models import model_info, model_page
from services.gateway.gateway import Gateway
from services.gateway.openapi import described
from services.gateway.replies.error_reply import speaks_anthropic
from services.gateway.schemas.replies import ModelCard, ModelList


def router(gateway: Gateway) -> APIRouter:
    """The model endpoints."""
    routes = APIRouter(tags=["models"])

    @routes.get("/v1/models", **described(None, ModelList))
    async def list_models(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=1000)] = 20,
        after_id: str = "",
        before_id: str = "",
    ) -> Response:
        """Lists what the caller's key allows; with the header `anthropic-version` in Anthropic's shape, in pages."""
        cards = [_card(gateway)] if current_caller().may_use(gateway.model.name) else []
        if speaks_anthropic(request.scope):
            return model_page(cards, limit, after_id, before_id).response()
        return ModelList(data=cards).response()

    @routes.get("/v1/models/{name:path}", **described(None, ModelCard))
    async def retrieve_model(request: Request, name: str) -> Response:
        """Describes one model; with the header `anthropic-version` in Anthropic's shape."""
        gateway.model.check_name(name)
        current_caller().check_may_use(name)
        card = _card(gateway)
        return model_info(card).response() if speaks_anthropic(request.scope) else card.response()

    return routes


def _card(gateway: Gateway) -> ModelCard:
    """`max_model_len` is what the connected workers admit, where they admit less than the checkpoint."""
    model = gateway.model
    return ModelCard(
        id=model.name,
        created=model.created,
        root=gateway.settings.model,
        max_model_len=gateway.health.workers.context_len(model.max_model_len),
    )
