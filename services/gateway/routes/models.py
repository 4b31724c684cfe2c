"""`/v1/models`: the one model that is served, and what is known of it."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from services.gateway.gateway import Gateway
from services.gateway.openapi import described
from services.gateway.schemas.replies import ModelCard, ModelList


def router(gateway: Gateway) -> APIRouter:
    """The model endpoints."""
    routes = APIRouter(tags=["models"])

    @routes.get("/v1/models", **described(None, ModelList))
    async def list_models() -> Response:
        """Lists what is served."""
        return ModelList(data=[_card(gateway)]).response()

    @routes.get("/v1/models/{name:path}", **described(None, ModelCard))
    async def retrieve_model(name: str) -> Response:
        """Describes one model."""
        gateway.model.check_name(name)
        return _card(gateway).response()

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
