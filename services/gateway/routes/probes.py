"""Probes, version and metrics."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from services.gateway.gateway import Gateway
from services.gateway.openapi import described
from services.gateway.schemas.replies import HealthReport, LiveReport, VersionReport


def router(gateway: Gateway) -> APIRouter:
    """What operators and load balancers ask."""
    routes = APIRouter(tags=["operations"])

    @routes.get("/live", **described(None, LiveReport))
    async def live() -> Response:
        """Whether the process turns."""
        return LiveReport().response()

    @routes.get("/health", **described(None, HealthReport, also={503: HealthReport}))
    @routes.get("/ready", **described(None, HealthReport, also={503: HealthReport}))
    async def ready() -> Response:
        """Whether requests can be served, and if not, why."""
        report = HealthReport.model_validate(gateway.health.report())
        return report.response(503 if report.reason else 200)

    @routes.get("/version", **described(None, VersionReport))
    async def version() -> Response:
        """What runs here."""
        return VersionReport(version=gateway.version, model=gateway.model.name).response()

    @routes.get("/metrics", **described(None, None, media_type="text/plain"))
    async def metrics(request: Request) -> Response:
        """Prometheus metrics."""
        body, content_type = gateway.metrics.exposition(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    return routes
