"""The transport over UCX, as the event loop sees it; `ucx_engine.py` has the thread that does the work.

UCX neither authenticates nor encrypts: the network must be private. Its listener binds every interface, so a filter in
the kernel (`listen_filter`) keeps out who connects to another address than was chosen, or was not admitted.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import structlog

from shared.errors import ConfigurationError
from shared.transfer.checksum import Block, is_contiguous
from shared.transfer.listen_filter import ListenFilter, interface_addresses
from shared.transfer.transport import Endpoint, TransportError
from shared.transfer.ucx_engine import UcxEngine
from shared.transfer.ucx_operation import Kind, Link, Operation

log = structlog.get_logger(__name__)

_JOIN_S = 10.0

_SHM_LANES = 2
"""There a transfer is one thread's copy, by which memory is not nearly busy: two take two thirds of the time."""

_TCP = {"TCP_TX_SEG_SIZE": "64K", "TCP_CM_REUSEADDR": "y"}
_PRESETS = {
    "tcp": {"TLS": "tcp,self", **_TCP},
    # One copy, made by the receiver (CMA). Both processes must share user, PID and IPC namespace: else UCX crashes.
    # In large pieces, because the engine looks around after each; half a millisecond is not too long to be away.
    "shm": {"TLS": "tcp,self,sm", "MM_ERROR_HANDLING": "y", "CMA_MEMORY_INVALIDATE": "y", "CMA_SEG_SIZE": "2M", **_TCP},
    # Device memory. Between workers of one host by CUDA IPC; else UCX stages it through host memory by itself.
    # Left alone UCX looks at 16 copies at a time; looking at 64, 128 blocks arrive a tenth to a third sooner.
    "cuda": {"TLS": "tcp,self,cuda_copy,cuda_ipc", "CUDA_IPC_MAX_POLL": "64", **_TCP},
}


def ucx_options(tls: str, devices: str) -> dict[str, str]:
    """UCX settings for a transport choice.

    Args:
        tls: "tcp", "shm" (processes of one host), "cuda" (arenas in device memory; see the presets), or a UCX transport
            list for hardware that this platform's UCX knows, e.g. "rc,tcp,self".
        devices: Names of network devices, separated by commas; "" = all.
    """
    options = dict(_PRESETS.get(tls, {"TLS": tls, **_TCP}))
    return {**options, "NET_DEVICES": devices} if devices else options


def listen_choice(tls: str, host: str, interfaces: str) -> tuple[str, list[str]]:
    """Which devices UCX opens, and under which own addresses it may be connected to ([] = any).

    Args:
        tls: See `ucx_options`.
        host: Where this process serves: its address, as for any other server, unless it is 0.0.0.0.
        interfaces: Names of network interfaces, separated by commas; wins over `host`.

    Raises:
        ConfigurationError: An interface has no IPv4 address, so that nobody could connect over it.
    """
    known = interface_addresses()
    if interfaces:
        names = [name.strip() for name in interfaces.split(",")]
        if unknown := [name for name in names if name not in known]:
            raise ConfigurationError(
                f"no IPv4 address on interface {', '.join(unknown)}; known: {', '.join(sorted(known))}"
            )
        return ",".join(names), [known[name] for name in names]
    try:
        addresses = {str(found[4][0]) for found in socket.getaddrinfo(host, None, socket.AF_INET)} - {"0.0.0.0"}
    except OSError:
        addresses = set()  # no name of an IPv4 address: gRPC's listener says whether it is an address at all
    devices = sorted(name for name, address in known.items() if address in addresses)
    if not addresses or not devices:
        return ("lo", ["127.0.0.1"]) if _is_loopback(addresses) else ("", [])
    # Devices of other transports have names of their own; only for ours is the choice known.
    return ",".join(devices) if tls in _PRESETS or devices == ["lo"] else "", sorted(addresses)


def is_staged(tls: str, peer: str, own: Collection[str]) -> bool:
    """Whether UCX takes device memory through host memory on the way to `peer`: CUDA IPC ends at the host.

    Args:
        tls: See `ucx_options`.
        peer: Its IP address.
        own: This host's addresses.
    """
    return tls == "cuda" and peer not in own and not ipaddress.ip_address(peer).is_loopback


def _is_loopback(addresses: set[str]) -> bool:
    return bool(addresses) and all(ipaddress.ip_address(address).is_loopback for address in addresses)


class _UcxEndpoint:
    """An endpoint as the event loop sees it."""

    def __init__(self, engine: UcxEngine, link: Link) -> None:
        self._engine = engine
        self._link = link

    @property
    def is_open(self) -> bool:
        return self._link.is_open

    def send(self, payload: bytes) -> asyncio.Future[None]:
        future = self._engine.new_future()
        return self._post(future, self._sending(payload, future))

    def receive(self, size: int) -> asyncio.Future[bytes]:
        future = self._engine.new_future()
        return self._post(future, self._receiving(size, future))

    def send_blocks(
        self, blocks: Sequence[Block], tag_base: int, last: Callable[[], bytes] | None = None
    ) -> asyncio.Future[None]:
        future = self._engine.new_future()

        def follow() -> Operation:
            assert last is not None
            return self._sending(last(), future)

        sending = Operation(Kind.SEND_BLOCKS, self._link, future, blocks, tag_base, then=follow if last else None)
        return self._post(future, sending)

    def receive_blocks(
        self,
        blocks: Sequence[Block],
        tag_base: int,
        on_arrival: Callable[[int], None] | None = None,
        *,
        request: bytes = b"",
        last_bytes: int = 0,
    ) -> asyncio.Future[bytes]:
        future = self._engine.new_future()
        arriving = Operation(
            Kind.RECEIVE_BLOCKS,
            self._link,
            future,
            blocks,
            tag_base,
            bytes,  # the result where nothing follows
            on_arrival,
            (lambda: self._receiving(last_bytes, future)) if last_bytes else None,
        )
        return self._post(future, arriving, self._sending(request, future, is_aside=True) if request else None)

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

    def _sending(self, payload: bytes, future: asyncio.Future[Any], *, is_aside: bool = False) -> Operation:
        return Operation(Kind.SEND, self._link, future, [np.frombuffer(payload, dtype=np.uint8)], is_aside=is_aside)

    def _receiving(self, size: int, future: asyncio.Future[Any]) -> Operation:
        memory = np.empty(size, dtype=np.uint8)
        return Operation(Kind.RECEIVE, self._link, future, [memory], result=memory.tobytes)

    def _post(
        self, future: asyncio.Future[Any], operation: Operation, amid: Operation | None = None
    ) -> asyncio.Future[Any]:
        """Has an operation posted, and one amid its requests, both with `future`, in one turn of the engine."""
        # UCX would send a strided view's first bytes in a row, without an error.
        buffers = [*operation.buffers, *(amid.buffers if amid else ())]
        assert all(map(is_contiguous, buffers)), "not contiguous"
        self._engine.command(lambda: self._engine.post(operation, amid), future)
        return future


async def _probe(engine: UcxEngine) -> None:
    future = engine.new_future()
    engine.command(lambda: engine.resolve(future, None), future)
    await future


class UcxTransport:
    """The data plane over UCX; one per process.

    Args:
        tls: See `ucx_options`.
        host: Where this process serves.
        port: Of the listener; 0 = any.
        interfaces: See `listen_choice`.
        filters: The listener drops what `interfaces` and `admits_all` do not let in; False = it drops nothing.
        admits_all: Whoever reaches an address that was chosen may connect; else those for whom `admit` was called, and
            those that this process connects to itself.
        on_failure: Called once if an engine ends on its own. Memory given to it may then still be written: the process
            must end without telling anyone that a transfer is over.
    """

    def __init__(
        self,
        tls: str,
        host: str,
        port: int,
        *,
        on_failure: Callable[[BaseException], None],
        interfaces: str = "",
        filters: bool = True,
        admits_all: bool = True,
    ) -> None:
        devices, destinations = listen_choice(tls, host, interfaces)
        self.name = f"ucx:{tls}"
        self.lanes = min(_SHM_LANES, len(os.sched_getaffinity(0))) if tls == "shm" else 1
        self._tls = tls
        self._known_peers: set[str] = set()
        self._options = ucx_options(tls, devices)
        # Over several devices UCX picks the addresses that it connects from, and gRPC's tell nothing about them.
        admits_all = admits_all or len(destinations) != 1
        self._listen_filter = (
            ListenFilter(destinations, admits_all=admits_all) if filters else ListenFilter([], admits_all=True)
        )
        self._requested_port = port
        self._on_failure = on_failure
        self._engines: list[UcxEngine] = []  # one per lane; the first one listens
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
            on_endpoint(_UcxEndpoint(listening, link))

        listening = await self._start_engine(self._requested_port, on_link)
        self._port = listening.ready.result()
        for _ in range(1, self.lanes):
            await self._start_engine(None, on_link)

    async def _start_engine(self, port: int | None, on_link: Callable[[Link], None]) -> UcxEngine:
        engine = UcxEngine(self._options, port, on_link, self._failed, self._listen_filter)
        engine.start()
        await engine.ready
        self._engines.append(engine)
        return engine

    async def probe(self) -> None:
        """Returns when each engine's thread has taken a turn.

        Raises:
            TransportError: They are not started, or stopped.
        """
        if not self._engines:
            raise TransportError("the data plane is not started")
        for engine in self._engines:
            await _probe(engine)

    def admit(self, source: str) -> None:
        """Lets an address connect, where not everybody may."""
        self._listen_filter.admit(source)

    async def connect(self, host: str, port: int, *, lane: int = 0) -> Endpoint:
        """Opens an endpoint to a peer's listener.

        Raises:
            TransportError: The name does not resolve, or UCX refuses the address.
        """
        if not self._engines:
            raise TransportError("the data plane is not started")
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as exc:
            raise TransportError(f"cannot resolve {host}: {exc}") from exc
        address = str(found[0][4][0])
        self.admit(address)  # the peer's side may connect back
        self._say_if_staged(address)
        engine = self._engines[lane]
        future = engine.new_future()
        engine.command(lambda: engine.connect(address, port, future), future)
        return _UcxEndpoint(engine, await future)

    async def stop(self) -> None:
        """Closes every endpoint and UCX itself."""
        for engine in self._engines:
            engine.request_stop()
        for engine in self._engines:
            await asyncio.shield(engine.finished)
            await asyncio.to_thread(engine.join, _JOIN_S)

    def _say_if_staged(self, address: str) -> None:
        """Once per peer, which also is how often it asks for this host's addresses."""
        if address in self._known_peers:
            return
        self._known_peers.add(address)
        if is_staged(self._tls, address, interface_addresses().values()):
            log.warning("blocks_staged_through_host", peer=address, reason="CUDA IPC ends at the host")

    def _failed(self, error: BaseException) -> None:
        if len(self._engines) == self.lanes:  # before that, `start` raises
            self._on_failure(error)
