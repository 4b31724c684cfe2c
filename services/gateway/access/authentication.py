"""Checks the API key of every HTTP request, and notes who calls."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.access.admission import Admission
from services.gateway.access.caller import Caller, set_caller
from services.gateway.access.keyring import Keyring
from services.gateway.access.rate_limits import Standing
from services.gateway.gateway import Gateway
from services.gateway.middleware import Middleware
from services.gateway.replies.error_reply import error_response
from shared.errors import InvalidRequest, NotAuthenticated, TandemError

OPEN_PATHS = frozenset(
    {
        "/live",
        "/health",
        "/ready",
        "/version",
        "/metrics",
        "/docs",
        "/openapi.json",
        "/v2/health/live",
        "/v2/health/ready",
    }
)
"""For probes, scrapers and readers; everything else is a tenant's."""

MAX_TIMEOUT_S = 86_400.0


class Authentication(Middleware):
    """Sets the caller of everything below it; refuses who is not known or asks too often."""

    def __init__(self, app: ASGIApp, gateway: Gateway, keyring: Keyring, admission: Admission) -> None:
        super().__init__(app)
        self._gateway = gateway
        self._keyring = keyring
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves the ASGI call."""
        if scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            await self._app(scope, receive, send)
            return
        standings: dict[str, Standing] = {}
        try:
            caller = await caller_of(Headers(scope=scope), self._keyring)
            set_caller(caller)
            standings = caller.standings
            if scope["method"] == "POST":
                await self._admission.count_request(caller)
        except TandemError as exc:
            self._gateway.note_failure(exc)
            await error_response(exc, scope)(scope, receive, _with_headers(send, standings))
            return
        await self._app(scope, receive, _with_headers(send, standings) if standings else send)


async def caller_of(headers: Headers, keyring: Keyring) -> Caller:
    """Who calls, by the headers of an HTTP request or the metadata of a gRPC call.

    Raises:
        NotAuthenticated: Keys are asked for, and this is none of them.
        InvalidRequest: `x-request-timeout-s` is no deadline.
    """
    timeout_s = _timeout(headers.get("x-request-timeout-s"))
    if keyring.is_empty:
        return Caller(timeout_s=timeout_s)
    record = await keyring.identify(_presented_key(headers))
    return Caller(record.tenant, record, timeout_s)


def _presented_key(headers: Headers) -> str:
    """From `Authorization: Bearer`, or from `x-api-key` as Anthropic's clients send it."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key:
        return key.strip()
    if key := headers.get("x-api-key", ""):
        return key
    raise NotAuthenticated("no API key: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'")


def _timeout(value: str | None) -> float:
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= MAX_TIMEOUT_S:
        raise InvalidRequest(
            f"x-request-timeout-s is {value[:32]!r}, must be a number in (0, {MAX_TIMEOUT_S:g}]",
            param="x-request-timeout-s",
        )
    return seconds


def _with_headers(send: Send, standings: Mapping[str, Standing]) -> Send:
    """With the limits as they stand when the response starts: what the request itself took is counted by then."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for standing in standings.values():
                for name, value in standing.headers().items():
                    headers[name] = value
        await send(message)

    return send_with_headers
