"""`/metrics`, `/live` and `/ready` of a service without an HTTP front of its own, in the same event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator

import uvicorn
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from shared.errors import ConfigurationError
from shared.metrics.registry import exposition

Readiness = Callable[[], tuple[bool, str]]

_CLOSE_TIMEOUT_S = 1


class MetricsServer:
    """A running listener; made by `serve_metrics`.

    Attributes:
        url: "http://host:port", or "" when it is off.
    """

    def __init__(self, url: str, server: uvicorn.Server | None, task: asyncio.Task[None] | None) -> None:
        self.url = url
        self._server = server
        self._task = task

    async def close(self) -> None:
        """Answers what was asked and stops listening; within about a second. Idempotent."""
        if self._server is None or self._task is None:
            return
        self._server.should_exit = True
        await self._task
        self._server = self._task = None


async def serve_metrics(host: str, port: int, registry: CollectorRegistry, readiness: Readiness) -> MetricsServer:
    """Starts the listener.

    `/live` is 200 as long as the event loop turns, for that is what answers it. `/ready` is 200 or 503 with the reason:
    `{"ready": false, "reason": "draining"}`.

    Args:
        host: Address to bind.
        port: 0 = any, -1 = no listener.
        registry: What `/metrics` shows.
        readiness: Whether new work is welcome, and if not, why; called on the event loop, must not block.

    Raises:
        ConfigurationError: The address is taken or not ours.
    """
    if port < 0:
        return MetricsServer("", None, None)
    listening = _bind(host, port)
    config = uvicorn.Config(
        _application(registry, readiness),
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listening]), name="metrics-http")
    name = f"[{host}]" if ":" in host else host
    return MetricsServer(f"http://{name}:{listening.getsockname()[1]}", server, task)


class _Server(uvicorn.Server):
    """Leaves the signals to the service: this listener is a part of it, not the other way round."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _application(registry: CollectorRegistry, readiness: Readiness) -> Starlette:
    async def metrics(request: Request) -> Response:
        body, content_type = exposition(registry, request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    async def live(request: Request) -> Response:
        return PlainTextResponse("live\n")

    async def ready(request: Request) -> Response:
        is_ready, reason = readiness()
        return JSONResponse({"ready": is_ready, "reason": reason}, status_code=200 if is_ready else 503)

    return Starlette(routes=[Route("/metrics", metrics), Route("/live", live), Route("/ready", ready)])


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()  # whoever calls from here on is answered when the server is up
    except OSError as exc:
        raise ConfigurationError(f"cannot listen on {host}:{port} for metrics: {exc}") from exc
    return listening
