"""The seam between the block protocol and what carries it.

An endpoint is one connection. It has an ordered byte stream for the few bytes of control, and tagged blocks that land
straight in the memory that was posted for them. One rule makes memory safe:

    Whatever goes wrong - an error, a timeout, a cancelled wait - the endpoint is closed, and only when `close` has
    returned may the memory of its unfinished blocks be used for anything else.

Nothing else stops a transport that has matched a message to a buffer: dropping the wait does not.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from shared.transfer.checksum import Block


class TransportError(Exception):
    """The endpoint failed, was closed, or could not be made. Close it; memory is safe after that."""


class Endpoint(Protocol):
    """One connection; used from the event loop that made its transport."""

    @property
    def is_open(self) -> bool:
        """Nothing is known to be wrong with it."""
        ...

    def send(self, payload: bytes) -> Awaitable[None]:
        """Starts sending on the stream; the result is there when `payload` has been handed over."""
        ...

    def receive(self, size: int) -> Awaitable[bytes]:
        """Starts receiving exactly `size` bytes from the stream."""
        ...

    def send_blocks(
        self, blocks: Sequence[Block], tag_base: int, last: Callable[[], bytes] | None = None
    ) -> Awaitable[None]:
        """Starts sending block `i` under `tag_base + i`; done when the memory is not read any more.

        `last` is called then, and what it makes is sent on the stream; the result is there when it was handed over. It
        is called perhaps from the thread that carries all transfers: it must be quick, and must not raise. It may be
        called although nobody waits any more, as long as `close` has not returned.
        """
        ...

    def receive_blocks(
        self,
        blocks: Sequence[Block],
        tag_base: int,
        on_arrival: Callable[[int], None] | None = None,
        *,
        request: bytes = b"",
        last_bytes: int = 0,
    ) -> Awaitable[bytes]:
        """Posts memory for the blocks tagged `tag_base + i`, then sends `request` on the stream.

        Done when all have arrived, and after them `last_bytes` bytes on the stream: its result. A block that is shorter
        than its memory counts as arrived; checksums tell.

        `on_arrival` is called with each `i`, in order, while later blocks may still be under way; perhaps from a thread
        that carries all transfers, so it must take no longer than to read the block does, and must not raise. It is not
        called once `close` has returned.
        """
        ...

    async def close(self) -> None:
        """Ends the connection at once. On return nothing touches the memory that was given to it. Idempotent."""
        ...


class Transport(Protocol):
    """One process's access to the data plane.

    Attributes:
        name: For logs and status.
        port: Where peers connect to; 0 before `start`.
        lanes: So many threads bring blocks, each over its own endpoints. More than one where the receiver alone copies,
            while the sender rests, and several copies at once are sooner done.
    """

    name: str
    lanes: int

    @property
    def port(self) -> int: ...

    async def start(self, on_endpoint: Callable[[Endpoint], None]) -> None:
        """Starts listening; every endpoint that a peer opens is handed to `on_endpoint` on the event loop."""
        ...

    async def probe(self) -> None:
        """Returns when the data plane has taken a turn; bound it with `asyncio.timeout`.

        Raises:
            TransportError: It is stopped.
        """
        ...

    def admit(self, source: str) -> None:
        """Lets an address connect, where not everybody may."""
        ...

    async def connect(self, host: str, port: int, *, lane: int = 0) -> Endpoint:
        """Opens an endpoint on a lane. It may turn out dead only at its first use.

        Raises:
            TransportError: The peer's name or address cannot be used.
        """
        ...

    async def stop(self) -> None:
        """Closes every endpoint, then the listener. Idempotent."""
        ...
