"""The protocol over HTTP: JSON, and tensors as bytes behind it. Also Triton's `generate` and `generate_stream`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from services.gateway.disconnect import unless_disconnected
from services.gateway.gateway import Gateway
from services.gateway.kserve.inference import (
    MODEL_VERSION,
    InferRequest,
    by_name,
    check_model,
    check_parameters,
    infer,
    infer_stream,
)
from services.gateway.kserve.metadata import model_config, model_metadata, repository_index, server_metadata
from services.gateway.kserve.schemas import GenerateBody, GenerateReply, InferBody, InferReply, KServeError
from services.gateway.kserve.tensors import Tensor, column, tensor_from, tensor_from_raw
from services.gateway.openapi import described
from services.gateway.replies.stream_chunks import event
from services.gateway.requests.body_reader import UnknownFields, check_names, parse_object, read_body
from shared.errors import InvalidRequest, TandemError

HEADER_LENGTH = "inference-header-content-length"
MODEL = "/v2/models/{name}"
VERSION = MODEL + "/versions/{version}"

describe = partial(described, errors=KServeError)


def router(gateway: Gateway) -> APIRouter:
    """The protocol's paths, with and without a model version."""
    routes = APIRouter(tags=["kserve"])
    unknown_fields = gateway.settings.unknown_fields
    _add_probes(routes, gateway)
    _add_model(routes, gateway)

    @routes.post(MODEL + "/infer", **describe(InferBody, InferReply))
    @routes.post(VERSION + "/infer", **describe(InferBody, InferReply))
    async def model_infer(request: Request, name: str, version: str = "") -> Response:
        """One answer."""
        received_s, raw = time.monotonic(), await read_body(request, gateway.settings.max_body_bytes)
        content, wanted = _parsed(raw, request.headers.get(HEADER_LENGTH), name, version, unknown_fields)
        tensors = await unless_disconnected(request.scope, infer(gateway, wanted, received_s))
        return _infer_response(content, name, wanted.request_id, tensors)

    @routes.post(MODEL + "/generate", **describe(GenerateBody, GenerateReply))
    @routes.post(VERSION + "/generate", **describe(GenerateBody, GenerateReply))
    async def generate(request: Request, name: str, version: str = "") -> Response:
        """One answer, without tensors."""
        received_s, raw = time.monotonic(), await read_body(request, gateway.settings.max_body_bytes)
        wanted = _generate_request(raw, name, version, unknown_fields)
        tensors = await unless_disconnected(request.scope, infer(gateway, wanted, received_s))
        return _json(_generate_reply(name, tensors))

    @routes.post(MODEL + "/generate_stream", **describe(GenerateBody, None, media_type="text/event-stream"))
    @routes.post(VERSION + "/generate_stream", **describe(GenerateBody, None, media_type="text/event-stream"))
    async def generate_stream(request: Request, name: str, version: str = "") -> Response:
        """An answer as server-sent events, without tensors."""
        received_s, raw = time.monotonic(), await read_body(request, gateway.settings.max_body_bytes)
        pieces = infer_stream(gateway, _generate_request(raw, name, version, unknown_fields), received_s)
        first = await anext(pieces)  # what fails until then gets a proper status
        return StreamingResponse(_events(gateway, name, first, pieces), media_type="text/event-stream")

    return routes


def _add_probes(routes: APIRouter, gateway: Gateway) -> None:
    @routes.get("/v2", **describe(None, None))
    async def server() -> Response:
        """What the server is."""
        return _json(server_metadata(gateway))

    @routes.get("/v2/health/live", **describe(None, None))
    async def server_live() -> Response:
        """The process turns."""
        return _json({"live": True})

    @routes.get("/v2/health/ready", **describe(None, None))
    async def server_ready() -> Response:
        """Requests can be served."""
        return _json({"ready": not gateway.health.reason()}, 503 if gateway.health.reason() else 200)

    @routes.post("/v2/repository/index", **describe(None, None))
    async def index() -> Response:
        """Which models there are."""
        return Response(orjson.dumps(repository_index(gateway)), media_type="application/json")


def _add_model(routes: APIRouter, gateway: Gateway) -> None:
    @routes.get(MODEL, **describe(None, None))
    @routes.get(VERSION, **describe(None, None))
    async def model(name: str, version: str = "") -> Response:
        """What the model reads and writes."""
        check_model(gateway, name, version)
        return _json(model_metadata(gateway))

    @routes.get(MODEL + "/ready", **describe(None, None))
    @routes.get(VERSION + "/ready", **describe(None, None))
    async def model_ready(name: str, version: str = "") -> Response:
        """Requests can be served by it."""
        check_model(gateway, name, version)
        is_ready = not gateway.health.reason()
        return _json({"name": name, "ready": is_ready}, 200 if is_ready else 503)

    @routes.get(MODEL + "/config", **describe(None, None))
    @routes.get(VERSION + "/config", **describe(None, None))
    async def config(name: str, version: str = "") -> Response:
        """How the model is served."""
        check_model(gateway, name, version)
        return _json(model_config(gateway))


_FIELDS = ("id", "parameters", "inputs", "outputs")
_INPUT_FIELDS, _OUTPUT_FIELDS = ("name", "datatype", "shape", "parameters", "data"), ("name", "parameters")


def _parsed(
    raw: bytes, header_length: str | None, name: str, version: str, unknown_fields: UnknownFields
) -> tuple[dict[str, Any], InferRequest]:
    """The JSON part, and the request with its tensors from either part."""
    length = len(raw)
    if header_length is not None:
        if not header_length.isdecimal() or int(header_length) > len(raw):
            raise InvalidRequest(f"{HEADER_LENGTH} is {header_length[:32]!r}, the body has {len(raw)} bytes")
        length = int(header_length)
    content: dict[str, Any] = parse_object(raw[:length])
    check_names(content, _FIELDS, "", unknown_fields)
    position, inputs = length, list[Tensor]()
    for i, item in enumerate(_objects(content, "inputs")):
        check_names(item, _INPUT_FIELDS, f"inputs[{i}]", unknown_fields)
        tensor_name, datatype, shape = _head(item)
        parameters = _parameters(item)
        check_parameters(tensor_name, parameters, ("binary_data_size",))
        size = parameters.get("binary_data_size")
        if size is None:
            inputs.append(tensor_from(tensor_name, datatype, shape, _flat(item.get("data"))))
            continue
        if type(size) is not int or not 0 <= size <= len(raw) - position:
            raise InvalidRequest(f"input {tensor_name!r}: binary_data_size is {size!r:.32}", param=tensor_name)
        inputs.append(tensor_from_raw(tensor_name, datatype, shape, raw[position : position + size]))
        position += size
    if position != len(raw):
        raise InvalidRequest(f"{len(raw) - position} bytes follow the last input")
    request_id = content.get("id", "")
    outputs: list[str] = []
    for i, item in enumerate(_objects(content, "outputs")):
        check_names(item, _OUTPUT_FIELDS, f"outputs[{i}]", unknown_fields)
        outputs.append(str(item.get("name")))
        check_parameters(outputs[i], _parameters(item), ("binary_data",))
    return content, InferRequest(name, version, by_name(inputs), _parameters(content), outputs, str(request_id)[:256])


def _objects(content: dict[str, Any], field: str) -> list[dict[str, Any]]:
    items = content.get(field, [])
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise InvalidRequest(f"{field!r} must be a list of objects", param=field)
    return items


def _parameters(content: dict[str, Any]) -> dict[str, Any]:
    parameters = content.get("parameters", {})
    if not isinstance(parameters, dict):
        raise InvalidRequest("'parameters' must be an object", param="parameters")
    return parameters


def _head(item: dict[str, Any]) -> tuple[str, str, list[int]]:
    name, datatype, shape = item.get("name"), item.get("datatype"), item.get("shape")
    is_shape = isinstance(shape, list) and all(type(size) is int for size in shape)
    if not isinstance(name, str) or not isinstance(datatype, str) or not is_shape:
        raise InvalidRequest("an input needs 'name', 'datatype' and 'shape'", param="inputs")
    assert isinstance(shape, list)
    return name[:64], datatype, shape


def _flat(data: object) -> list[object]:
    """Elements in row-major order; nesting is optional in JSON."""
    if not isinstance(data, list):
        raise InvalidRequest("the 'data' of an input must be a list", param="inputs")
    pending, elements = data[::-1], list[object]()
    while pending:
        item = pending.pop()
        if isinstance(item, list):
            pending.extend(item[::-1])
        else:
            elements.append(item)
    return elements


def _infer_response(content: dict[str, Any], name: str, request_id: str, tensors: list[Tensor]) -> Response:
    """Each output as JSON or as bytes, as the request wants."""
    default = _parameters(content).get("binary_data_output", False)
    wants = {str(o.get("name")): _parameters(o).get("binary_data", default) for o in _objects(content, "outputs")}
    outputs: list[dict[str, object]] = []
    binary = b""
    for tensor in tensors:
        output: dict[str, object] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        if wants.get(tensor.name, default):
            packed = tensor.packed()
            output["parameters"] = {"binary_data_size": len(packed)}
            binary += packed
        else:
            output["data"] = [_json_element(element) for element in tensor.elements]
        outputs.append(output)
    head: dict[str, object] = {"model_name": name, "model_version": MODEL_VERSION, "outputs": outputs}
    body = orjson.dumps({"id": request_id, **head} if request_id else head)
    if not binary:
        return Response(body, media_type="application/json")
    return Response(body + binary, media_type="application/octet-stream", headers={HEADER_LENGTH: str(len(body))})


def _generate_request(raw: bytes, name: str, version: str, unknown_fields: UnknownFields) -> InferRequest:
    """`{"text_input": ..., "parameters": {...}}`; further inputs of one element may stand beside the text."""
    content = dict(parse_object(raw))
    parameters, text, request_id = _parameters(content), content.pop("text_input", None), content.pop("id", "")
    content.pop("parameters", None)
    if not isinstance(text, str):
        raise InvalidRequest("the field 'text_input' is required: a text", param="text_input")
    inputs = {"text_input": column("text_input", "BYTES", [text.encode()])}
    for field in ("stream", "exclude_input_in_output", *(f for f in content if f.startswith("return_"))):
        value = content.pop(field, parameters.pop(field, None))
        if value is not None:
            inputs[field] = tensor_from(field, "BOOL", [1], [value])
    check_names(content, (), "", unknown_fields)
    return InferRequest(name, version, inputs, parameters, (), str(request_id)[:256])


def _generate_reply(name: str, tensors: list[Tensor]) -> dict[str, object]:
    values = {tensor.name: _json_element(tensor.elements[0]) for tensor in tensors}
    return {"model_name": name, "model_version": MODEL_VERSION, **values}


async def _events(
    gateway: Gateway, name: str, first: list[Tensor], pieces: AsyncIterator[list[Tensor]]
) -> AsyncIterator[bytes]:
    yield event(_generate_reply(name, first))
    try:
        async for tensors in pieces:
            yield event(_generate_reply(name, tensors))
    except TandemError as exc:
        gateway.note_failure(exc)
        yield event({"error": exc.message})


def _json_element(element: object) -> object:
    return element.decode() if isinstance(element, bytes) else element


def _json(content: dict[str, object], status_code: int = 200) -> Response:
    return Response(orjson.dumps(content), status_code=status_code, media_type="application/json")
