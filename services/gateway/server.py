"""The HTTP server, under the process's own loop and signals."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from services.gateway.http_protocol import HttpProtocol
from shared.errors import ConfigurationError

BACKLOG = 2048
LAST_REQUESTS_S = 0.5
"""A stopping gateway still serves connections that were made just before."""
LAST_WORDS_S = 1.0
"""For telling those whose requests a drain has cut short."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 lets the system choose.

    Raises:
        ConfigurationError: The port is taken, or the host is not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as exc:
        listener.close()
        raise ConfigurationError(f"cannot listen on {host}:{port}: {exc.strerror or exc}") from exc
    listener.setblocking(False)
    return listener


def address_of(listener: socket.socket, host: str) -> str:
    """`host:port` as clients dial it; a wildcard becomes loopback."""
    port = listener.getsockname()[1]
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: `serve_until` is told when to stop."""

    def __init__(self, app: ASGIApp, *, drain_s: float, last_requests_s: float = LAST_REQUESTS_S) -> None:
        self._last_requests_s = last_requests_s
        super().__init__(
            uvicorn.Config(
                app,
                http=HttpProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=max(1, round(drain_s)),
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the process."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """New connections are refused at once; one just made may still send its request, and it is the last there."""
        for server in self.servers:
            server.close()
        for listener in sockets or ():
            listener.close()
        closing = (b"connection", b"close")
        self.server_state.default_headers = [*self.server_state.default_headers, closing]
        await asyncio.sleep(self._last_requests_s)
        await super().shutdown(sockets)
        if cut_short := list(self.server_state.tasks):
            await asyncio.wait(cut_short, timeout=LAST_WORDS_S)

    async def serve_until(self, listener: socket.socket, stop: asyncio.Event) -> None:
        """Serves, then lets open requests finish for at most `drain_s`; what is open then ends with an error."""
        serving = asyncio.create_task(self.serve(sockets=[listener]))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            self.should_exit = True
            await serving
