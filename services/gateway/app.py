"""The HTTP surface: routes to the pipeline, errors to OpenAI's shape."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import orjson
import structlog
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from services.gateway.body_reader import read_body
from services.gateway.disconnect import unless_disconnected
from services.gateway.error_reply import error_response, framework_error_response
from services.gateway.generation import Generation
from services.gateway.health import Health
from services.gateway.metrics import RequestMetrics
from services.gateway.pipeline import Pipeline
from services.gateway.replies import collect
from services.gateway.served_model import ServedModel
from services.gateway.sse import EventStream
from services.gateway.timing import timing_block
from shared.errors import InternalError, TandemError

log = structlog.get_logger(__name__)

Open = Callable[[bytes, float], Awaitable[Generation]]


@dataclass(frozen=True, slots=True)
class Gateway:
    """What the routes need."""

    model: ServedModel
    pipeline: Pipeline
    health: Health
    metrics: RequestMetrics
    version: str
    max_body_bytes: int


def create_app(gateway: Gateway) -> FastAPI:
    """The application. Bodies are read and checked by our own code, whose errors name the field and the limit."""
    app = FastAPI(title="Tandem", version=gateway.version, openapi_url=None, docs_url=None, redoc_url=None)
    _add_generation(app, gateway)
    _add_models(app, gateway.model)
    _add_probes(app, gateway)
    _add_errors(app, gateway)
    return app


def _add_generation(app: FastAPI, gateway: Gateway) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _generate(gateway, request, gateway.pipeline.chat)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _generate(gateway, request, gateway.pipeline.completion)


async def _generate(gateway: Gateway, request: Request, start: Open) -> Response:
    """From the body to a reply that is complete, or about to stream. A client that leaves ends it at any point."""
    raw = await read_body(request, gateway.max_body_bytes)
    generation = await unless_disconnected(request.receive, _started(start, raw, time.monotonic()))
    reply = gateway.pipeline.reply_format(generation)
    if generation.request.stream:
        return EventStream(generation, reply, partial(_note_failure, gateway))
    try:
        choices = await unless_disconnected(request.receive, collect(generation))
    finally:
        generation.close()
    timing = timing_block(generation) if generation.request.timing else None
    return Response(reply.whole(choices, generation.usage, timing), media_type="application/json")


async def _started(start: Open, raw: bytes, received_s: float) -> Generation:
    return await start(raw, received_s)


def _add_models(app: FastAPI, model: ServedModel) -> None:
    described = {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "tandem",
        "max_model_len": model.max_model_len,
    }

    @app.get("/v1/models")
    async def list_models() -> Response:
        return _json({"object": "list", "data": [described]})

    @app.get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> Response:
        model.check_name(name)
        return _json(described)


def _add_probes(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/live")
    async def live() -> Response:
        return _json({"status": "ok"})

    @app.get("/ready")
    @app.get("/health")
    async def ready() -> Response:
        report = gateway.health.report()
        return _json(report, status_code=503 if report["reason"] else 200)

    @app.get("/version")
    async def version() -> Response:
        return _json({"version": gateway.version, "service": "gateway", "model": gateway.model.name})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        body, content_type = gateway.metrics.exposition(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})


def _json(content: dict[str, object], status_code: int = 200) -> Response:
    return Response(orjson.dumps(content), status_code=status_code, media_type="application/json")


def _add_errors(app: FastAPI, gateway: Gateway) -> None:
    @app.exception_handler(TandemError)
    async def on_error(request: Request, exc: TandemError) -> Response:
        _note_failure(gateway, exc)
        return error_response(exc)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, exc: HTTPException) -> Response:
        return framework_error_response(exc)

    @app.exception_handler(Exception)
    async def on_defect(request: Request, exc: Exception) -> Response:
        # Starlette raises it again afterwards, so the server's log has the traceback.
        error = InternalError("internal error; the gateway's log has the details")
        _note_failure(gateway, error)
        return error_response(error)


def _note_failure(gateway: Gateway, error: TandemError) -> None:
    gateway.metrics.request_failed(error.code)
    log.info("request_failed", code=error.code, error=error.message)
