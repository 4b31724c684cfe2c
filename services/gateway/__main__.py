"""`python -m services.gateway`: the HTTP front."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import time

import structlog

from services.gateway.app import create_app
from services.gateway.assembly import assemble
from services.gateway.kserve.server import serve_grpc
from services.gateway.served_model import load_model
from services.gateway.server import HttpServer, address_of, bind
from services.gateway.settings import GatewaySettings
from services.gateway.worker_processes import follow_parent, supervise
from shared.directory.client import Directory
from shared.directory.records import GatewayRecord, TransferRecord, WorkerRecord
from shared.errors import ConfigurationError
from shared.identity import new_incarnation
from shared.lifecycle import run_service
from shared.log import configure_logging

log = structlog.get_logger(__name__)


async def serve(settings: GatewaySettings, stop: asyncio.Event) -> None:
    """Serves until `stop` is set, then drains and leaves the directory.

    Raises:
        ConfigurationError: The model, the port or a setting is unusable.
    """
    if settings.workers > 1 and settings.grpc_port > 0:
        raise ConfigurationError(f"one process only can listen on grpc_port {settings.grpc_port}; workers is not 1")
    with _listener(settings) as listener:
        if settings.workers > 1:
            await supervise(settings, listener, stop)
            return
        following = asyncio.create_task(follow_parent(stop)) if settings.listener >= 0 else None
        try:
            await _serve(settings, listener, stop)
        finally:
            if following:
                following.cancel()


def _listener(settings: GatewaySettings) -> socket.socket:
    """Bound here, or inherited."""
    if settings.listener >= 0:
        return socket.socket(fileno=settings.listener)
    return bind(settings.host, settings.port)


async def _serve(settings: GatewaySettings, listener: socket.socket, stop: asyncio.Event) -> None:
    incarnation = new_incarnation()
    gateway_id = settings.gateway_id or f"gateway-{incarnation[:6]}"
    configure_logging("gateway", settings.log_level, settings.log_format, gateway_id=gateway_id)
    log.info("settings", **settings.masked())
    model = await asyncio.to_thread(load_model, settings, created=int(time.time()))
    address = address_of(listener, settings.host)
    record = GatewayRecord(gateway_id=gateway_id, incarnation=incarnation, address=address, pid=os.getpid())
    async with (
        Directory(settings.redis_url, watch=(WorkerRecord, TransferRecord)) as directory,
        assemble(settings, model, directory, gateway_id) as gateway,
        serve_grpc(gateway),
    ):
        await directory.announce(lambda: record)
        app = create_app(gateway)
        # All of this stays: a full collection would walk 100,000 objects, and every stream would stand still for it.
        gc.collect()
        gc.freeze()
        log.info("listening", url=f"http://{address}", model=model.name)
        await HttpServer(app, drain_s=settings.drain_s).serve_until(listener, stop)
    log.info("stopped")


def main() -> None:
    """Entry point."""
    run_service(lambda stop: serve(GatewaySettings.from_environment(), stop), "gateway")


if __name__ == "__main__":
    main()
