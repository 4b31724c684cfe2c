"""The protocol over gRPC: `inference.GRPCInferenceService`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, TypeVar

import grpc
import structlog
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from starlette.datastructures import Headers
from structlog.contextvars import bound_contextvars

from protos import kserve_pb2 as pb
from protos import kserve_pb2_grpc as rpc
from services.gateway.access.authentication import caller_of
from services.gateway.access.caller import Caller, set_caller
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
from services.gateway.kserve.tensors import Tensor, tensor_from, tensor_from_raw
from shared.errors import InternalError, InvalidRequest, Overloaded, TandemError

log = structlog.get_logger(__name__)

MAX_STREAM_REQUESTS = 256
FINAL = "triton_final_response"
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}

M = TypeVar("M", bound=Message)
_Context = grpc.aio.ServicerContext[Any, Any]


class KServeServicer(rpc.GRPCInferenceServiceServicer):
    """One for the gateway. A `TandemError` reaches the caller as its gRPC status."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def ServerLive(self, request: pb.ServerLiveRequest, context: _Context) -> pb.ServerLiveResponse:  # noqa: N802
        """The process turns."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: _Context) -> pb.ServerReadyResponse:  # noqa: N802
        """Requests can be served."""
        return pb.ServerReadyResponse(ready=not self._gateway.health.reason())

    async def ModelReady(self, request: pb.ModelReadyRequest, context: _Context) -> pb.ModelReadyResponse:  # noqa: N802
        """Likewise, of a model."""
        await self._identify(context)
        check_model(self._gateway, request.name, request.version)
        return pb.ModelReadyResponse(ready=not self._gateway.health.reason())

    async def ServerMetadata(  # noqa: N802
        self, request: pb.ServerMetadataRequest, context: _Context
    ) -> pb.ServerMetadataResponse:
        """What the server is."""
        await self._identify(context)
        return _message(pb.ServerMetadataResponse(), server_metadata(self._gateway))

    async def ModelMetadata(  # noqa: N802
        self, request: pb.ModelMetadataRequest, context: _Context
    ) -> pb.ModelMetadataResponse:
        """What the model reads and writes."""
        await self._identify(context)
        check_model(self._gateway, request.name, request.version)
        return _message(pb.ModelMetadataResponse(), model_metadata(self._gateway))

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: _Context) -> pb.ModelConfigResponse:  # noqa: N802
        """How the model is served."""
        await self._identify(context)
        check_model(self._gateway, request.name, request.version)
        return _message(pb.ModelConfigResponse(), {"config": model_config(self._gateway)})

    async def RepositoryIndex(  # noqa: N802
        self, request: pb.RepositoryIndexRequest, context: _Context
    ) -> pb.RepositoryIndexResponse:
        """Which models there are."""
        await self._identify(context)
        models = [m for m in repository_index(self._gateway) if m["state"] == "READY" or not request.ready]
        return _message(pb.RepositoryIndexResponse(), {"models": models})

    async def ModelInfer(self, request: pb.ModelInferRequest, context: _Context) -> pb.ModelInferResponse:  # noqa: N802
        """One answer."""
        try:
            await self._admit(context)
            with bound_contextvars(grpc_request_id=request.id[:128]):
                tensors = await infer(self._gateway, _from_wire(request), time.monotonic())
        except TandemError as exc:
            self._gateway.note_failure(exc)
            raise
        return _to_wire(request, tensors)

    async def ModelStreamInfer(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.ModelInferRequest], context: _Context
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """Any number of requests at a time, each with any number of answers; an error is an answer too."""
        await self._admit(context)
        answers: asyncio.Queue[pb.ModelStreamInferResponse | None] = asyncio.Queue()
        reader = asyncio.create_task(self._read_stream(request_iterator, answers))
        try:
            while (answer := await answers.get()) is not None:
                yield answer
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _admit(self, context: _Context) -> None:
        """The call's metadata tell whose it is, as the headers of an HTTP request do; a stream counts once."""
        await self._gateway.admission.count_request(await self._identify(context))

    async def _identify(self, context: _Context) -> Caller:
        """Everything but the server's own probes is a tenant's, as it is over HTTP."""
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        caller = await caller_of(Headers(metadata), self._gateway.keyring)
        set_caller(caller)
        return caller

    async def _read_stream(
        self,
        requests: AsyncIterator[pb.ModelInferRequest],
        answers: asyncio.Queue[pb.ModelStreamInferResponse | None],
    ) -> None:
        async with asyncio.TaskGroup() as group:
            running: set[asyncio.Task[None]] = set()
            async for request in requests:
                if len(running) >= MAX_STREAM_REQUESTS:
                    error = Overloaded(f"{len(running)} requests of this stream are under way already")
                    answers.put_nowait(_stream_error(request, error))
                    continue
                with bound_contextvars(grpc_request_id=request.id[:128]):
                    task = group.create_task(self._answer(request, answers))
                running.add(task)
                task.add_done_callback(running.discard)
        answers.put_nowait(None)

    async def _answer(
        self, wire: pb.ModelInferRequest, answers: asyncio.Queue[pb.ModelStreamInferResponse | None]
    ) -> None:
        """All answers to one request of a stream; whatever goes wrong is told in the last."""
        try:
            request, received_s = _from_wire(wire), time.monotonic()
            if request.wants_stream:
                async for tensors in infer_stream(self._gateway, request, received_s):
                    answers.put_nowait(pb.ModelStreamInferResponse(infer_response=_to_wire(wire, tensors, final=False)))
            else:
                tensors = await infer(self._gateway, request, received_s)
                answers.put_nowait(pb.ModelStreamInferResponse(infer_response=_to_wire(wire, tensors, final=False)))
        except TandemError as exc:
            self._gateway.note_failure(exc)
            answers.put_nowait(_stream_error(wire, exc))
            return
        except Exception:
            log.exception("stream_infer_failed", request_id=wire.id)
            error = InternalError("internal error; the gateway's log has the details")
            self._gateway.note_failure(error)
            answers.put_nowait(_stream_error(wire, error))
            return
        if wire.parameters["triton_enable_empty_final_response"].bool_param:
            answers.put_nowait(pb.ModelStreamInferResponse(infer_response=_to_wire(wire, [], final=True)))


def _from_wire(wire: pb.ModelInferRequest) -> InferRequest:
    raw = wire.raw_input_contents
    if raw and len(raw) != len(wire.inputs):
        raise InvalidRequest(f"{len(raw)} raw_input_contents for {len(wire.inputs)} inputs")
    tensors: list[Tensor] = []
    for index, tensor in enumerate(wire.inputs):
        check_parameters(tensor.name, tensor.parameters)
        if raw:
            tensors.append(tensor_from_raw(tensor.name, tensor.datatype, tensor.shape, raw[index]))
        else:
            elements = getattr(tensor.contents, _CONTENTS.get(tensor.datatype, "bytes_contents"))
            tensors.append(tensor_from(tensor.name, tensor.datatype, tensor.shape, list(elements)))
    for output in wire.outputs:
        check_parameters(output.name, output.parameters)
    return InferRequest(
        model_name=wire.model_name,
        model_version=wire.model_version,
        inputs=by_name(tensors),
        parameters={name: _parameter(value) for name, value in wire.parameters.items()},
        outputs=[output.name for output in wire.outputs],
        request_id=wire.id,
    )


def _parameter(value: pb.InferParameter) -> object:
    choice = value.WhichOneof("parameter_choice")
    return None if choice is None else getattr(value, choice)


def _to_wire(
    request: pb.ModelInferRequest, tensors: list[Tensor], *, final: bool | None = None
) -> pb.ModelInferResponse:
    response = pb.ModelInferResponse(model_name=request.model_name, model_version=MODEL_VERSION, id=request.id)
    if final is not None:
        response.parameters[FINAL].bool_param = final
    for tensor in tensors:
        response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        response.raw_output_contents.append(tensor.packed())
    return response


def _stream_error(request: pb.ModelInferRequest, error: TandemError) -> pb.ModelStreamInferResponse:
    return pb.ModelStreamInferResponse(
        error_message=f"{error.code}: {error.message}", infer_response=_to_wire(request, [], final=True)
    )


def _message(message: M, content: Mapping[str, object]) -> M:
    """Fills a message from JSON values of the same names."""
    ParseDict(dict(content), message)
    return message
