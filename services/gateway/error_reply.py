"""Errors in OpenAI's shape, as a reply of their own or as an event inside a stream."""

from __future__ import annotations

import orjson
from starlette.exceptions import HTTPException
from starlette.responses import Response

from shared.errors import InvalidRequest, TandemError

RETRY_AFTER_S = "1"


def error_body(error: TandemError) -> bytes:
    """`{"error": {...}}` as JSON."""
    return orjson.dumps(
        {
            "error": {
                "message": error.message,
                "type": error.openai_type,
                "param": error.param,
                "code": error.code,
            }
        }
    )


def error_response(error: TandemError) -> Response:
    """The reply to a request that failed before anything else was sent."""
    headers = {"retry-after": RETRY_AFTER_S} if error.retryable else None
    return Response(error_body(error), status_code=error.http_status, media_type="application/json", headers=headers)


def framework_error_response(exc: HTTPException) -> Response:
    """The reply where routing itself failed: no such path, or not with this method."""
    code = {404: "not_found", 405: "method_not_allowed"}.get(exc.status_code, "http_error")
    body = {"error": {"message": exc.detail, "type": InvalidRequest.openai_type, "param": None, "code": code}}
    return Response(orjson.dumps(body), status_code=exc.status_code, media_type="application/json", headers=exc.headers)
