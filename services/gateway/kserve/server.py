"""The gRPC listener of KServe's protocol, for as long as the gateway serves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog

from protos import kserve_pb2_grpc as rpc
from services.gateway.gateway import Gateway
from services.gateway.kserve.grpc_servicer import KServeServicer
from shared.rpc import bind_tcp, new_server

log = structlog.get_logger(__name__)


@asynccontextmanager
async def serve_grpc(gateway: Gateway) -> AsyncIterator[str]:
    """Serves where the settings say, and gives the address; "" if nowhere.

    Raises:
        ConfigurationError: The port is taken.
    """
    settings = gateway.settings
    if settings.grpc_port < 0:
        yield ""
        return
    server = new_server()
    rpc.add_GRPCInferenceServiceServicer_to_server(KServeServicer(gateway), server)
    address = bind_tcp(server, settings.host, settings.grpc_port)
    await server.start()
    log.info("listening_grpc", address=address)
    try:
        yield address
    finally:
        await server.stop(settings.drain_s)
