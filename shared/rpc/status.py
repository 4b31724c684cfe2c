"""Errors on the wire: a `TandemError` travels as its gRPC status, with its code in the trailing metadata."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import grpc

from shared.errors import (
    Cancelled,
    InternalError,
    RequestTimeout,
    TandemError,
    WorkerLost,
    error_from_code,
)

CODE_KEY = "tandem-code"
PARAM_KEY = "tandem-param"

# The status line travels in HTTP/2 headers, where peers accept 8 KiB in all.
_MAX_MESSAGE_CHARS = 1024

# What a status means that no servicer of ours sent: gRPC itself, on either side, made it.
_TRANSPORT_ERRORS: dict[grpc.StatusCode, type[TandemError]] = {
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.DEADLINE_EXCEEDED: RequestTimeout,
    grpc.StatusCode.UNAVAILABLE: WorkerLost,
}

# What grpc.aio makes of the status if a message is sent while the call ends: how it ended is lost.
_ENDED_UNDER_A_WRITE = (grpc.StatusCode.INTERNAL, "Internal error from Core")


async def abort_with(context: grpc.aio.ServicerContext[Any, Any], error: TandemError) -> NoReturn:
    """Ends the call with `error`; never returns."""
    metadata = [(CODE_KEY, error.code)]
    if error.param is not None and error.param.isascii() and error.param.isprintable():
        metadata.append((PARAM_KEY, error.param))
    await context.abort(
        grpc.StatusCode[error.grpc_status], error.message[:_MAX_MESSAGE_CHARS], trailing_metadata=tuple(metadata)
    )


def error_from_rpc(exc: grpc.aio.AioRpcError) -> TandemError:
    """The error that the servicer raised, or what a failure of the transport means.

    A connection that cannot be made or broke is `WorkerLost`, and so is a call that ended while a message was sent; a
    deadline is `RequestTimeout`, an end by the server's cancellation `Cancelled`. Any other status without a code of
    ours is a defect: `InternalError`.
    """
    metadata = {str(key): value for key, value in exc.trailing_metadata() or ()}
    message = exc.details() or exc.code().name
    code = metadata.get(CODE_KEY)
    if code is not None:
        error = error_from_code(str(code), message)
        param = metadata.get(PARAM_KEY)
        error.param = None if param is None else str(param)
        return error
    if (exc.code(), exc.details()) == _ENDED_UNDER_A_WRITE:
        return WorkerLost("the call ended while a message was sent")
    cls = _TRANSPORT_ERRORS.get(exc.code())
    return InternalError(f"{exc.code().name}: {message}") if cls is None else cls(message)


@contextmanager
def rpc_errors() -> Iterator[None]:
    """Turns the `AioRpcError` of calls made inside into the `TandemError` it stands for.

    `asyncio.CancelledError` (this side cancelled the call) passes unchanged.
    """
    try:
        yield
    except grpc.aio.AioRpcError as exc:
        raise error_from_rpc(exc) from exc
