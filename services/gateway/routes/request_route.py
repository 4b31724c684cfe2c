"""A route whose endpoint takes the request and nothing else."""

from __future__ import annotations

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.types import Receive, Scope, Send


class RequestRoute(APIRoute):
    """Calls its endpoint at once.

    Solving the dependencies of an endpoint that has none, with stacks of what to undo after them, costs more than
    rendering a chunk. FastAPI still describes it; errors are answered further out, as everybody's are.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves the ASGI call."""
        if self.methods and scope["method"] not in self.methods:
            await super().handle(scope, receive, send)  # says which methods there are
            return
        response = await self.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)
