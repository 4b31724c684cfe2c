"""The transport over UCX, as the event loop sees it; `ucx_engine.py` has the thread that does the work.

UCX neither authenticates nor encrypts, and its listener binds every interface: the network must be private.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from shared.transfer.checksum import Block
from shared.transfer.transport import Endpoint, TransportError
from shared.transfer.ucx_engine import Kind, Link, Operation, UcxEngine

_JOIN_S = 10.0

_TCP = {"TCP_TX_SEG_SIZE": "64K", "TCP_CM_REUSEADDR": "y"}
_PRESETS = {
    "tcp": {"TLS": "tcp,self", **_TCP},
    # One copy, made by the receiver (CMA). Both processes must share user, PID and IPC namespace: else UCX crashes.
    "shm": {"TLS": "tcp,self,sm", "MM_ERROR_HANDLING": "y", "CMA_MEMORY_INVALIDATE": "y", **_TCP},
}


def ucx_options(tls: str, host: str) -> dict[str, str]:
    """UCX settings for a transport choice.

    Args:
        tls: "tcp", "shm" (processes of one host, see the preset), or a UCX transport list for hardware that this
            platform's UCX knows, e.g. "rc,tcp,self".
        host: Where peers find this process; with a loopback address no other device is opened.
    """
    options = dict(_PRESETS.get(tls, {"TLS": tls, **_TCP}))
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    if is_loopback:
        options["NET_DEVICES"] = "lo"
    return options


class _UcxEndpoint:
    """An endpoint as the event loop sees it."""

    def __init__(self, engine: UcxEngine, link: Link) -> None:
        self._engine = engine
        self._link = link

    @property
    def is_open(self) -> bool:
        return self._link.is_open

    def send(self, payload: bytes) -> asyncio.Future[None]:
        return self._post(Kind.SEND, [np.frombuffer(payload, dtype=np.uint8)])

    def receive(self, size: int) -> asyncio.Future[bytes]:
        memory = np.empty(size, dtype=np.uint8)
        return self._post(Kind.RECEIVE, [memory], result=memory.tobytes)

    def send_blocks(self, blocks: Sequence[Block], tag_base: int) -> asyncio.Future[None]:
        return self._post(Kind.SEND_BLOCKS, blocks, tag_base)

    def receive_blocks(self, blocks: Sequence[Block], tag_base: int) -> asyncio.Future[None]:
        return self._post(Kind.RECEIVE_BLOCKS, blocks, tag_base)

    async def close(self) -> None:
        engine, link = self._engine, self._link
        future = engine.new_future()

        def run() -> None:
            engine.close(link)
            engine.resolve(future, None)

        engine.command(run, future)
        try:
            await future
        except TransportError:
            await asyncio.shield(engine.finished)  # a stopping engine closes every endpoint

    def _post(
        self, kind: Kind, buffers: Sequence[Block], tag_base: int = 0, result: Callable[[], object] | None = None
    ) -> asyncio.Future[Any]:
        # UCX would send a strided view's first bytes in a row, without an error.
        assert all(buffer.flags.c_contiguous for buffer in buffers), "blocks must be contiguous"
        future = self._engine.new_future()
        operation = Operation(kind, self._link, future, buffers, tag_base, result)
        self._engine.command(lambda: self._engine.post(operation), future)
        return future


class UcxTransport:
    """The data plane over UCX; one per process.

    Args:
        tls: See `ucx_options`.
        host: Where peers find this process.
        port: Of the listener; 0 = any.
        on_failure: Called once if the engine ends on its own. Memory given to it may then still be written: the process
            must end without telling anyone that a transfer is over.
    """

    def __init__(self, tls: str, host: str, port: int, *, on_failure: Callable[[BaseException], None]) -> None:
        self.name = f"ucx:{tls}"
        self._options = ucx_options(tls, host)
        self._requested_port = port
        self._on_failure = on_failure
        self._engine: UcxEngine | None = None
        self._port = 0

    @property
    def port(self) -> int:
        """Of the listener; 0 before `start`."""
        return self._port

    async def start(self, on_endpoint: Callable[[Endpoint], None]) -> None:
        """Opens UCX and listens.

        Raises:
            TransportError: UCX refuses an option or the port is taken.
        """

        def on_link(link: Link) -> None:
            on_endpoint(_UcxEndpoint(engine, link))

        engine = UcxEngine(self._options, self._requested_port, on_link, self._failed)
        engine.start()
        self._port = await engine.ready
        self._engine = engine

    async def connect(self, host: str, port: int) -> Endpoint:
        """Opens an endpoint to a peer's listener.

        Raises:
            TransportError: The name does not resolve, or UCX refuses the address.
        """
        if self._engine is None:
            raise TransportError("the data plane is not started")
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as exc:
            raise TransportError(f"cannot resolve {host}: {exc}") from exc
        address = str(found[0][4][0])
        engine, future = self._engine, self._engine.new_future()
        engine.command(lambda: engine.connect(address, port, future), future)
        return _UcxEndpoint(engine, await future)

    async def stop(self) -> None:
        """Closes every endpoint and UCX itself."""
        engine = self._engine
        if engine is None:
            return
        engine.request_stop()
        await asyncio.shield(engine.finished)
        await asyncio.to_thread(engine.join, _JOIN_S)

    def _failed(self, error: BaseException) -> None:
        if self._engine is not None:  # before that, `start` raises
            self._on_failure(error)
