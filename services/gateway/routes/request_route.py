"""Routes whose endpoint takes the request and nothing else, at a path without parameters."""

from __future__ import annotations

from collections.abc import Iterable

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from services.gateway.gateway import Gateway
from services.gateway.middleware import Middleware
from services.gateway.replies.error_reply import error_response
from shared.errors import TandemError


class RequestRoute(APIRoute):
    """One of them. FastAPI describes it; `RequestRoutes` calls its endpoint."""


class RequestRoutes(Middleware):
    """Finds an endpoint by its method and path, and calls it at once.

    Trying one route after the other, solving the dependencies of an endpoint that has none, and stacks of what to undo
    afterwards cost more than rendering several chunks. What is not found here is left to the framework.
    """

    def __init__(self, app: ASGIApp, gateway: Gateway, routes: Iterable[BaseRoute]) -> None:
        super().__init__(app)
        self._gateway = gateway
        self._endpoints = {
            (method, route.path): route.endpoint
            for route in routes
            if isinstance(route, RequestRoute)
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves the ASGI call."""
        endpoint = self._endpoints.get((scope["method"], scope["path"]))
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        try:
            response = await endpoint(Request(scope, receive, send))
            await response(scope, receive, send)
        except TandemError as exc:
            self._gateway.note_failure(exc)
            await error_response(exc, scope)(scope, receive, send)
