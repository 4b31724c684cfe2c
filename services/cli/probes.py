"""How the supervisor tells that each kind of process serves."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable

import httpx

from services.cli.cluster import ClusterSpec, transfer_socket
from services.cli.process import ManagedProcess, last_lines
from services.cli.supervisor import Readiness
from shared.directory.client import Directory

_TIMEOUT_S = 1.0
_PERCENT = re.compile(r"percent=\D{0,8}(\d+)")


class ClusterProbe:
    """A `Probe` for a real cluster. Each life of a process is told from the one before it by its pid.

    Args:
        http: Closed by the caller, as is `directory`.
    """

    def __init__(self, spec: ClusterSpec, redis_url: str, directory: Directory, http: httpx.AsyncClient) -> None:
        self._spec = spec
        self._redis_address = _host_and_port(redis_url)
        self._directory = directory
        self._http = http

    async def __call__(self, process: ManagedProcess) -> Readiness:
        """Asks the process in the way of its role."""
        match process.spec.role:
            case "redis":
                return await _answers(lambda: asyncio.open_connection(*self._redis_address), b"PING\r\n", b"+PONG")
            case "kv_transfer":
                path = transfer_socket(self._spec, process.spec.name.removesuffix(".transfer"))
                return await _answers(lambda: asyncio.open_unix_connection(path), b"", b"")
            case "prefill" | "decode":
                return self._worker(process)
            case "gateway":
                return await self._gateway()

    def _worker(self, process: ManagedProcess) -> Readiness:
        record = next((r for r in self._directory.workers() if r.pid == process.pid), None)
        if record is None:
            return Readiness(False, _loading(process))
        return Readiness(record.ready, "" if record.ready else "waiting for its kv_transfer")

    async def _gateway(self) -> Readiness:
        try:
            reply = await self._http.get(f"{self._spec.url}/ready", timeout=_TIMEOUT_S)
        except httpx.HTTPError:
            return Readiness(False)
        return Readiness(reply.status_code == 200, "waiting for workers")


def _loading(process: ManagedProcess) -> str:
    """What a worker that is not in the directory yet says in its log."""
    for line in reversed(last_lines(process.spec.log_path, 5)):
        if found := _PERCENT.search(line):
            return f"loading {found[1]} %"
    return "loading"


async def _answers(
    connect: Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]], ask: bytes, expect: bytes
) -> Readiness:
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            reader, writer = await connect()
            try:
                writer.write(ask)
                return Readiness((await reader.read(len(expect))).startswith(expect))
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return Readiness(False)


def _host_and_port(redis_url: str) -> tuple[str, int]:
    address = httpx.URL(redis_url)
    return address.host or "127.0.0.1", address.port or 6379
