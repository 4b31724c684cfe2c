"""`python -m services.gateway`: the HTTP front."""

from __future__ import annotations

import asyncio
import os
import time

import structlog

from services.gateway.app import create_app
from services.gateway.assembly import assemble
from services.gateway.served_model import load_model
from services.gateway.server import HttpServer, address_of, bind
from services.gateway.settings import GatewaySettings
from shared.directory.client import Directory
from shared.directory.records import GatewayRecord, TransferRecord, WorkerRecord
from shared.identity import new_incarnation
from shared.lifecycle import run_service
from shared.log import configure_logging

log = structlog.get_logger(__name__)


async def serve(settings: GatewaySettings, stop: asyncio.Event) -> None:
    """Serves until `stop` is set, then drains and leaves the directory.

    Raises:
        ConfigurationError: The model, the port or a setting is unusable.
    """
    incarnation = new_incarnation()
    gateway_id = settings.gateway_id or f"gateway-{incarnation[:6]}"
    configure_logging("gateway", settings.log_level, settings.log_format, gateway_id=gateway_id)
    log.info("settings", **settings.masked())
    model = await asyncio.to_thread(load_model, settings, created=int(time.time()))
    with bind(settings.host, settings.port) as listener:
        address = address_of(listener, settings.host)
        record = GatewayRecord(gateway_id=gateway_id, incarnation=incarnation, address=address, pid=os.getpid())
        async with (
            Directory(settings.redis_url, watch=(WorkerRecord, TransferRecord)) as directory,
            assemble(settings, model, directory, gateway_id) as gateway,
        ):
            await directory.announce(lambda: record)
            log.info("listening", url=f"http://{address}", model=model.name)
            await HttpServer(create_app(gateway), drain_s=settings.drain_s).serve_until(listener, stop)
    log.info("stopped")


def main() -> None:
    """Entry point."""
    run_service(lambda stop: serve(GatewaySettings.from_environment(), stop), "gateway")


if __name__ == "__main__":
    main()
