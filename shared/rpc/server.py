"""Servers: TCP and Unix sockets, tolerant of the keepalive pings of our channels, and honest about errors."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from shared.errors import ConfigurationError, InternalError, InvalidRequest, TandemError
from shared.rpc.access import check_caller
from shared.rpc.channel import PING_AFTER_S, transport_options, unix_target
from shared.rpc.status import abort_with
from shared.rpc.tls import TlsFiles

_log = structlog.get_logger(__name__)

_Context = grpc.aio.ServicerContext[Any, Any]


def new_server(*, checks_callers: bool = False) -> grpc.aio.Server:
    """Makes a server that is not yet bound or started.

    Servicers simply raise: a `TandemError` reaches the caller as itself (`error_from_rpc`), anything else is logged
    with its traceback and reaches the caller as `InternalError` without details.

    Args:
        checks_callers: Refuse calls that the caller's role has no right to, see `access`; for servers bound with TLS.
    """
    options = [
        *transport_options(),
        # Half of the clients' interval: jitter must not count as abuse. 0 strikes = never answer with GOAWAY.
        ("grpc.http2.min_ping_interval_without_data_ms", int(PING_AFTER_S * 500)),
        ("grpc.http2.max_ping_strikes", 0),
        # Two processes on one port would share its connections at random.
        ("grpc.so_reuseport", 0),
    ]
    return grpc.aio.server(options=options, interceptors=[_ErrorInterceptor(checks_callers=checks_callers)])


def bind_tcp(server: grpc.aio.Server, host: str, port: int, *, tls: TlsFiles | None = None) -> str:
    """Binds a TCP port.

    Args:
        server: Not started yet.
        host: A name or address; IPv6 without brackets.
        port: 0 lets the system choose.
        tls: Speak mutual TLS, and nothing else, as this identity.

    Returns:
        "host:port" as peers on the same network dial it.

    Raises:
        ConfigurationError: The address is taken or not ours, or the files of `tls` cannot be used.
    """
    name = f"[{host}]" if ":" in host else host
    credentials = tls.server_credentials() if tls else None
    try:
        if credentials is None:
            bound = server.add_insecure_port(f"{name}:{port}")
        else:
            bound = server.add_secure_port(f"{name}:{port}", credentials)
    except RuntimeError as exc:
        raise ConfigurationError(f"cannot listen on {name}:{port}: port taken, or not an address of ours") from exc
    return f"{name}:{bound}"


def bind_unix(server: grpc.aio.Server, path: str | Path) -> str:
    """Binds a Unix socket, for this user alone, replacing the file that a dead process left.

    Returns:
        The target to dial.

    Raises:
        ConfigurationError: The path is too long, or its directory is missing or not writable.
    """
    target = unix_target(path)
    # A mode set afterwards would leave an instant in which anybody may connect.
    mask = os.umask(0o177)
    try:
        server.add_insecure_port(target)
    except RuntimeError as exc:
        raise ConfigurationError(f"cannot listen on {target}: {exc}") from exc
    finally:
        os.umask(mask)
    return target


class _ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns what a servicer raises into a status; where asked to, checks the caller first."""

    def __init__(self, *, checks_callers: bool) -> None:
        self._checks_callers = checks_callers

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = str(handler_call_details.method)
        kind = ("stream" if handler.request_streaming else "unary") + (
            "_stream" if handler.response_streaming else "_unary"
        )
        wrap = _guard_stream if handler.response_streaming else _guard_unary
        decode = (_decode_stream if handler.request_streaming else _decode)(method, handler.request_deserializer)
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(
            wrap(method, getattr(handler, kind), decode, self._checks_callers),
            request_deserializer=None,  # `decode` does it, and says what is wrong in one line
            response_serializer=handler.response_serializer,
        )


def _decode(method: str, deserialize: Callable[[bytes], Any]) -> Callable[[Any], Any]:
    def decode(raw: bytes) -> Any:
        try:
            return deserialize(raw)
        except DecodeError as exc:
            raise InvalidRequest(f"{method}: {len(raw)} bytes that are no such request") from exc

    return decode


def _decode_stream(method: str, deserialize: Callable[[bytes], Any]) -> Callable[[Any], Any]:
    decode_one = _decode(method, deserialize)

    async def decode(raw_requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for raw in raw_requests:
            yield decode_one(raw)

    return decode


def _guard_unary(
    method: str,
    behavior: Callable[[Any, _Context], Awaitable[Any]],
    decode: Callable[[Any], Any],
    checks_caller: bool,
) -> Callable[[Any, _Context], Awaitable[Any]]:
    async def guarded(request: Any, context: _Context) -> Any:
        try:
            if checks_caller:
                check_caller(method, context.auth_context())
            return await behavior(decode(request), context)
        except grpc.aio.AbortError:
            raise
        except Exception as exc:
            await _abort(method, context, exc)

    return guarded


def _guard_stream(
    method: str,
    behavior: Callable[[Any, _Context], AsyncGenerator[Any, None] | Awaitable[None]],
    decode: Callable[[Any], Any],
    checks_caller: bool,
) -> Callable[[Any, _Context], AsyncIterator[Any]]:
    async def guarded(request: Any, context: _Context) -> AsyncIterator[Any]:
        try:
            if checks_caller:
                check_caller(method, context.auth_context())
            replies = behavior(decode(request), context)
            if not isinstance(replies, AsyncGenerator):
                await replies  # a coroutine that writes through the context
                return
            async with aclosing(replies) as stream:  # a cancelled call runs the servicer's `finally` now, not at GC
                async for reply in stream:
                    yield reply
        except grpc.aio.AbortError:
            raise
        except Exception as exc:
            await _abort(method, context, exc)

    return guarded


async def _abort(method: str, context: _Context, exc: Exception) -> None:
    if isinstance(exc, NotImplementedError):  # of the generated servicer
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method} is not served here")
    if not isinstance(exc, TandemError):
        _log.error("rpc_failed", method=method, exc_info=exc)
        exc = InternalError(f"internal error in {method}; the worker's log has the details")
    await abort_with(context, exc)
