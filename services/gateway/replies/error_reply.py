"""Errors in the shape of the API that was called: OpenAI's, Anthropic's or KServe's."""

from __future__ import annotations

import math

import orjson
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from shared.errors import InvalidRequest, NotAuthenticated, RateLimited, TandemError

RETRY_AFTER_S = "1"

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(error: TandemError) -> bytes:
    """OpenAI's `{"error": {...}}` as JSON."""
    return orjson.dumps(_openai(error.message, error.openai_type, error.param, error.code))


def anthropic_error(message: str, status: int) -> dict[str, object]:
    """Anthropic's `{"type": "error", "error": {...}}`."""
    return {"type": "error", "error": {"type": _ANTHROPIC_TYPES.get(status, "api_error"), "message": message}}


def speaks_anthropic(scope: Scope) -> bool:
    """Whether the client expects Anthropic's shapes: by the path, or by the header where two APIs share a path."""
    path: str = scope["path"]
    return path.startswith("/v1/messages") or (
        path.startswith("/v1/models") and "anthropic-version" in Headers(scope=scope)
    )


def error_response(error: TandemError, scope: Scope) -> Response:
    """The reply to a request that failed before anything else was sent, in the shape that it expects."""
    headers = {"retry-after": _retry_after(error)} if error.retryable else {}
    if isinstance(error, NotAuthenticated):
        headers["www-authenticate"] = "Bearer"
    body = _in_shape_of(scope, error.http_status, error.message, error.openai_type, error.param, error.code)
    return Response(body, status_code=error.http_status, media_type="application/json", headers=headers)


def _retry_after(error: TandemError) -> str:
    """Whole seconds, rounded up."""
    return str(max(1, math.ceil(error.retry_after_s))) if isinstance(error, RateLimited) else RETRY_AFTER_S


def framework_error_response(exc: HTTPException, scope: Scope) -> Response:
    """The reply where routing itself failed: no such path, or not with this method."""
    code = {404: "not_found", 405: "method_not_allowed"}.get(exc.status_code, "http_error")
    body = _in_shape_of(scope, exc.status_code, exc.detail, InvalidRequest.openai_type, None, code)
    return Response(body, status_code=exc.status_code, media_type="application/json", headers=exc.headers)


def _in_shape_of(scope: Scope, status: int, message: str, kind: str, param: str | None, code: str) -> bytes:
    if speaks_anthropic(scope):
        return orjson.dumps(anthropic_error(message, status))
    if scope["path"] == "/v2" or scope["path"].startswith("/v2/"):
        return orjson.dumps({"error": message})
    return orjson.dumps(_openai(message, kind, param, code))


def _openai(message: str, kind: str, param: str | None, code: str) -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
