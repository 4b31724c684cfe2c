"""`openapi.json` that is true: made from the very schemas that bodies are checked with and replies are made of.

Routes parse their bodies themselves, so FastAPI does not know them; `described` tells it, and `true_openapi` adds what
only a running gateway knows: whether unknown fields are refused, and the name of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from services.gateway.gateway import Gateway
from services.gateway.schemas.replies import ErrorReply

REF = "#/components/schemas/{model}"
JSON = "application/json"
SSE = "text/event-stream"

_ERRORS = {
    400: "The request cannot be served as written",
    404: "No such model or object",
    405: "Not with this method",
    408: "The request's deadline passed",
    413: "The body is too large",
    429: "Queues are full",
    500: "A defect",
    503: "No worker can take it now",
}


def described(
    body: type[BaseModel] | tuple[type[BaseModel], ...] | None,
    reply: type[BaseModel] | None,
    *,
    streams: bool = False,
    media_type: str = JSON,
    errors: type[BaseModel] = ErrorReply,
    also: Mapping[int, type[BaseModel]] | None = None,
    body_type: str = JSON,
) -> dict[str, Any]:
    """Keyword arguments of a route.

    Args:
        body: Schema of the JSON body, or several of which one applies; None = no body.
        reply: Schema of the reply; None = not JSON.
        streams: It may also come as server-sent events.
        media_type: Of the reply where `reply` is None.
        errors: Schema of the error replies.
        also: Further replies, by status.
        body_type: Media type of the body.
    """
    content: dict[str, Any] = {}
    if reply is None:
        content[media_type] = {"schema": {} if media_type == JSON else {"type": "string"}}
    if streams:
        content[SSE] = {"schema": {"type": "string"}}
    success: dict[str, Any] = {"description": "Success", "content": content}
    if reply is not None:
        success["model"] = reply
    responses: dict[int | str, Any] = {200: success}
    responses |= {status: {"description": text, "model": errors} for status, text in _ERRORS.items()}
    responses |= {status: {"description": "See the schema", "model": model} for status, model in (also or {}).items()}
    extra: dict[str, Any] = {}
    if body is not None:
        models = body if isinstance(body, tuple) else (body,)
        schemas = [model.model_json_schema(ref_template=REF) for model in models]
        schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        extra["requestBody"] = {"required": True, "content": {body_type: {"schema": schema}}}
    return {"responses": responses, "openapi_extra": extra}


def true_openapi(app: FastAPI, gateway: Gateway) -> dict[str, Any]:
    """The document, made once per application."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
            openapi_version="3.1.0",
        )
        definitions = document.setdefault("components", {}).setdefault("schemas", {})
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)  # FastAPI's own; ours are 400
                _hoist(operation, definitions)
        for name in ("HTTPValidationError", "ValidationError"):
            definitions.pop(name, None)
        _finish_bodies(document, gateway.model.name, is_closed=gateway.settings.unknown_fields == "refuse")
        app.openapi_schema = document
    return app.openapi_schema


def _hoist(node: Any, definitions: dict[str, Any]) -> None:
    """Moves nested `$defs` to the document's components."""
    if isinstance(node, dict):
        for name, definition in node.pop("$defs", {}).items():
            definitions.setdefault(name, definition)
            _hoist(definition, definitions)
        for value in list(node.values()):
            _hoist(value, definitions)
    elif isinstance(node, list):
        for value in node:
            _hoist(value, definitions)


def _finish_bodies(node: Any, model: str, *, is_closed: bool) -> None:
    """Says of our bodies what only a running gateway knows: the model, and whether unknown fields are refused."""
    if isinstance(node, dict):
        if node.pop("x-closed", False):
            if is_closed:
                node["additionalProperties"] = False
            if node["properties"].get("model", {}).get("type") == "string":
                node["properties"]["model"]["enum"] = [model]
        for value in node.values():
            _finish_bodies(value, model, is_closed=is_closed)
    elif isinstance(node, list):
        for value in node:
            _finish_bodies(value, model, is_closed=is_closed)
