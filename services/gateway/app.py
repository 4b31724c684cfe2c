"""The HTTP surface: one router per endpoint family, errors in the shape of the API that was called."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from services.gateway.access.authentication import Authentication
from services.gateway.access.rate_limits import RATE_HEADERS
from services.gateway.anthropic import routes as anthropic
from services.gateway.batches import file_routes as files
from services.gateway.batches import routes as batches
from services.gateway.embeddings import routes as embeddings
from services.gateway.gateway import Gateway
from services.gateway.kserve import http_routes as kserve
from services.gateway.last_word import LastWord
from services.gateway.middleware import HeadAsGet, RequestIds
from services.gateway.openapi import true_openapi
from services.gateway.replies.error_reply import error_response, framework_error_response
from services.gateway.responses import routes as responses
from services.gateway.routes import generation, models, probes, tokens
from services.gateway.routes.request_route import RequestRoutes
from shared.errors import InternalError, InvalidRequest, TandemError

DESCRIPTION = "LLM inference with disaggregated prefill and decode, behind the APIs that clients already speak."


def create_app(gateway: Gateway) -> ASGIApp:
    """The application: what every exchange gets, the short way to most endpoints, and the framework for the rest.

    Bodies are read and checked by our own code, whose errors name the field and the limit.
    """
    framework = _framework(gateway)
    app: ASGIApp = HeadAsGet(framework)
    app = RequestRoutes(app, gateway=gateway, routes=framework.routes)
    app = Authentication(app, gateway=gateway, keyring=gateway.keyring, admission=gateway.admission)
    if origins := gateway.settings.allowed_origins:
        app = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "request-id", "retry-after", *RATE_HEADERS],
        )
    app = RequestIds(LastWord(app))

    async def on_defect(request: Request, exc: Exception) -> Response:
        # Starlette raises it again afterwards, so the server's log has the traceback.
        error = InternalError("internal error; the gateway's log has the details")
        gateway.note_failure(error)
        return error_response(error, request.scope)

    return ServerErrorMiddleware(app, handler=on_defect)


def _framework(gateway: Gateway) -> FastAPI:
    """Knows every endpoint and describes it; finds those with parameters."""
    app = FastAPI(
        title="Tandem",
        version=gateway.version,
        description=DESCRIPTION,
        openapi_url="/openapi.json",
        docs_url="/docs",
        redoc_url=None,
        redirect_slashes=False,
    )
    for family in (generation, responses, anthropic, embeddings, files, batches, kserve, models, tokens, probes):
        # Not `include_router`, which would match every request twice, once by family and once by route.
        app.router.routes.extend(family.router(gateway).routes)
    _add_errors(app, gateway)
    app.openapi = lambda: true_openapi(app, gateway)  # type: ignore[method-assign]
    return app


def _add_errors(app: FastAPI, gateway: Gateway) -> None:
    @app.exception_handler(TandemError)
    async def on_error(request: Request, exc: TandemError) -> Response:
        gateway.note_failure(exc)
        return error_response(exc, request.scope)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, exc: HTTPException) -> Response:
        return framework_error_response(exc, request.scope)

    @app.exception_handler(RequestValidationError)
    async def on_bad_parameter(request: Request, exc: RequestValidationError) -> Response:
        """Bodies are ours; this is a parameter of the path or the query."""
        problem = exc.errors()[0]
        name = str(problem["loc"][-1])
        error = InvalidRequest(f"{name!r}: {problem['msg']}"[:500], param=name)
        gateway.note_failure(error)
        return error_response(error, request.scope)

    @app.exception_handler(Exception)
    async def on_defect(request: Request, exc: Exception) -> Response:
        raise exc  # is answered further out, whoever raised it
