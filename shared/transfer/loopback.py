"""A transport within one process, for tests of everything above it.

It keeps the habits of the real one that matter for safety: a posted block is written from outside, piece by piece, and
goes on being written after the waiting task was cancelled, until its endpoint is closed.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from shared.device_arena import DeviceBlock
from shared.transfer.checksum import Block, HostBlock
from shared.transfer.transport import Endpoint, TransportError

_PIECE_BYTES = 64 << 10


class LoopbackNetwork:
    """Where loopback transports find each other, and where tests make things go wrong.

    Attributes:
        is_stalled: While set, no block moves: a peer that hangs.
        damage: Applied to every block after it arrived: a wire that flips bits.
    """

    def __init__(self) -> None:
        self.transports: dict[int, LoopbackTransport] = {}
        self.ports = itertools.count(1)
        self.is_stalled = False
        self.damage: Callable[[HostBlock], None] | None = None


class LoopbackTransport:
    """One simulated process's transport."""

    def __init__(self, network: LoopbackNetwork) -> None:
        self.name = "loopback"
        self.lanes = 1
        self._network = network
        self._port = 0
        self._on_endpoint: Callable[[Endpoint], None] | None = None
        self._endpoints: list[_LoopbackEndpoint] = []

    @property
    def port(self) -> int:
        """Made up; 0 before `start`."""
        return self._port

    async def start(self, on_endpoint: Callable[[Endpoint], None]) -> None:
        """Joins the network."""
        self._on_endpoint = on_endpoint
        self._port = next(self._network.ports)
        self._network.transports[self._port] = self

    async def probe(self) -> None:
        """Always answers."""

    def admit(self, source: str) -> None:
        """Does nothing: everybody is within this process."""

    async def connect(self, host: str, port: int, *, lane: int = 0) -> Endpoint:
        """Makes a pair of endpoints; `host` and `lane` are ignored."""
        here, there = _LoopbackEndpoint(self._network), _LoopbackEndpoint(self._network)
        here.peer, there.peer = there, here
        self._endpoints.append(here)
        remote = self._network.transports.get(port)
        if remote is None or remote._on_endpoint is None:
            here.is_open = False  # found out at first use, as with UCX
        else:
            remote._endpoints.append(there)
            remote._on_endpoint(there)
        return here

    async def stop(self) -> None:
        """Closes every endpoint and leaves the network."""
        self._network.transports.pop(self._port, None)
        for endpoint in self._endpoints:
            await endpoint.close()


class _LoopbackEndpoint:
    """One end of a connection; whichever end posts last sets a block in motion."""

    def __init__(self, network: LoopbackNetwork) -> None:
        self.is_open = True
        self.peer: _LoopbackEndpoint | None = None
        self._network = network
        self._stream = bytearray()
        self._readers: list[tuple[int, asyncio.Future[bytes]]] = []
        self._inbox: dict[int, tuple[Block, asyncio.Future[None]]] = {}
        self._outbox: dict[int, tuple[Block, asyncio.Future[None]]] = {}
        self._moving: set[asyncio.Task[None]] = set()

    def send(self, payload: bytes) -> asyncio.Future[None]:
        future = self._future()
        if self._is_usable(future):
            assert self.peer is not None
            self.peer._stream += payload
            self.peer._feed_readers()
            future.set_result(None)
        return future

    def receive(self, size: int) -> asyncio.Future[bytes]:
        future: asyncio.Future[bytes] = self._future()
        if self._is_usable(future):
            self._readers.append((size, future))
            self._feed_readers()
        return future

    def send_blocks(
        self, blocks: Sequence[Block], tag_base: int, last: Callable[[], bytes] | None = None
    ) -> asyncio.Future[None]:
        sending = self._post(self._outbox, blocks, tag_base)
        return sending if last is None else self._then(sending, lambda: self.send(last()))

    def receive_blocks(
        self,
        blocks: Sequence[Block],
        tag_base: int,
        on_arrival: Callable[[int], None] | None = None,
        *,
        request: bytes = b"",
        last_bytes: int = 0,
    ) -> asyncio.Future[bytes]:
        arriving = self._post(self._inbox, blocks, tag_base, on_arrival)
        if request:
            self.send(request)
        return self._then(arriving, lambda: self.receive(last_bytes))

    def _then(self, first: asyncio.Future[None], follow: Callable[[], asyncio.Future[Any]]) -> asyncio.Future[Any]:
        """What follows once the first has succeeded, whether or not somebody waits for it."""
        both = self._future()

        def hand_on(done: asyncio.Future[Any]) -> None:
            if both.done() or done.cancelled():
                return
            if (error := done.exception()) is not None:
                both.set_exception(error)
            elif done is first:
                follow().add_done_callback(hand_on)
            else:
                both.set_result(done.result())

        first.add_done_callback(hand_on)
        return both

    async def close(self) -> None:
        peer = self.peer
        for endpoint in (self, peer):
            if endpoint is not None and endpoint.is_open:
                endpoint._end("endpoint closed" if endpoint is self else "endpoint lost its peer")
        await asyncio.gather(*self._moving, return_exceptions=True)

    def _post(
        self,
        box: dict[int, tuple[Block, asyncio.Future[None]]],
        blocks: Sequence[Block],
        tag_base: int,
        on_arrival: Callable[[int], None] | None = None,
    ) -> asyncio.Future[None]:
        whole = self._future()
        if not self._is_usable(whole):
            return whole
        parts = [self._future() for _ in blocks]
        for tag, (block, part) in enumerate(zip(blocks, parts, strict=True), tag_base):
            box[tag] = (block, part)

        num_reported = 0

        def settle_whole(part: asyncio.Future[None]) -> None:
            nonlocal num_reported
            if whole.done():
                return
            if part.exception() is not None:
                whole.set_exception(part.exception() or TransportError(""))
                return
            while num_reported < len(parts) and parts[num_reported].done():
                if on_arrival is not None:
                    on_arrival(num_reported)
                num_reported += 1
            if num_reported == len(parts):
                whole.set_result(None)

        for part in parts:
            part.add_done_callback(settle_whole)
        assert self.peer is not None
        self._match()
        self.peer._match()
        return whole

    def _match(self) -> None:
        """Starts moving every block of ours that the peer has memory for."""
        assert self.peer is not None
        for tag in self._outbox.keys() & self.peer._inbox.keys():
            move = asyncio.get_running_loop().create_task(self._move(self._outbox[tag], self.peer._inbox[tag]))
            del self._outbox[tag], self.peer._inbox[tag]
            for end in (self, self.peer):
                end._moving.add(move)
                move.add_done_callback(end._moving.discard)

    async def _move(
        self, source: tuple[Block, asyncio.Future[None]], target: tuple[Block, asyncio.Future[None]]
    ) -> None:
        read, written = source[0], target[0]
        assert not isinstance(read, DeviceBlock), "one process, host memory"
        assert not isinstance(written, DeviceBlock), "one process, host memory"
        size = min(read.nbytes, written.nbytes)
        for start in range(0, size, _PIECE_BYTES):
            await asyncio.sleep(0)
            while self._network.is_stalled and self.is_open:  # noqa: ASYNC110 - two events end it, and it is a test's
                await asyncio.sleep(0.001)
            if not self.is_open:
                for _, future in (source, target):
                    _fail(future, "endpoint closed")
                return
            written[start : min(size, start + _PIECE_BYTES)] = read[start : min(size, start + _PIECE_BYTES)]
        if self._network.damage is not None:
            self._network.damage(written)
        for _, future in (source, target):
            if not future.done():
                future.set_result(None)

    def _end(self, reason: str) -> None:
        self.is_open = False
        for _, reader in self._readers:
            _fail(reader, reason)
        for box in (self._inbox, self._outbox):
            for _, future in box.values():
                _fail(future, reason)
            box.clear()

    def _feed_readers(self) -> None:
        while self._readers and len(self._stream) >= self._readers[0][0]:
            size, future = self._readers.pop(0)
            payload = bytes(self._stream[:size])
            del self._stream[:size]
            if not future.done():
                future.set_result(payload)

    def _is_usable(self, future: asyncio.Future[Any]) -> bool:
        if not self.is_open:
            _fail(future, "endpoint is closed")
        return self.is_open

    def _future(self) -> asyncio.Future[Any]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda done: None if done.cancelled() else done.exception())
        return future


def _fail(future: asyncio.Future[Any], reason: str) -> None:
    if not future.done():
        future.set_exception(TransportError(reason))
