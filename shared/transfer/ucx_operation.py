"""What the engine thread has UCX do, as groups of requests on one connection."""

from __future__ import annotations

import asyncio
import collections
import os
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

# ucxx sets a variable of its own on import and UCX then warns that nobody used it.
os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
# A peer that went away is an outcome to us, reported with its context; ucxx would print it as an error as well.
os.environ.setdefault("UCXX_LOG_LEVEL", "FATAL")

from ucxx._lib import libucxx
from ucxx._lib.arr import Array
from ucxx.exceptions import UCXError
from ucxx.types import Tag, TagMaskFull

from shared.transfer.checksum import Block

__all__ = ["Kind", "Link", "Operation", "UCXError", "libucxx"]


class Kind(Enum):
    """What an operation does with its buffers."""

    SEND = "send"
    RECEIVE = "receive"
    SEND_BLOCKS = "send blocks"
    RECEIVE_BLOCKS = "receive blocks"


class Operation:
    """Requests that succeed or fail as one.

    Args:
        buffers: One request each; kept alive as long as the operation is.
        tag_base: Of the first block; the stream has no tags.
        result: Makes the future's result from what arrived.
        on_arrival: See `Endpoint.receive_blocks`.
        then: Makes what follows it on the same connection; `future` is for that one's success, then.
        is_aside: Another operation's success is what `future` is for. A failure of any of them fails it.
    """

    __slots__ = (
        "_num_posted", "buffers", "future", "is_aside", "kind", "link", "on_arrival", "requests", "result", "tag_base",
        "then",
    )  # fmt: skip

    def __init__(
        self,
        kind: Kind,
        link: Link,
        future: asyncio.Future[Any],
        buffers: Sequence[Block],
        tag_base: int = 0,
        result: Callable[[], object] | None = None,
        on_arrival: Callable[[int], None] | None = None,
        then: Callable[[], Operation] | None = None,
        is_aside: bool = False,
    ) -> None:
        self.kind = kind
        self.link = link
        self.future = future
        self.buffers = buffers
        self.tag_base = tag_base
        self.result = result
        self.on_arrival = on_arrival
        self.then = then
        self.is_aside = is_aside
        self.requests: collections.deque[Any] = collections.deque()
        self._num_posted = 0

    @property
    def is_posted(self) -> bool:
        """All requests were made."""
        return self._num_posted == len(self.buffers)

    def post_more(self, endpoint: Any, count: int) -> None:
        """Makes the next so many requests; UCX reads or writes their buffers from now on."""
        for buffer in self.buffers[self._num_posted : self._num_posted + count]:
            # One at a time: should one raise, those before it are still accounted for when the endpoint is closed.
            self.requests.append(self._request(endpoint, Array(buffer), self.tag_base + self._num_posted))
            self._num_posted += 1

    def take_completed(self) -> Exception | None:
        """Drops finished requests, in the order of posting; returns the first failure."""
        requests = self.requests
        while requests and requests[0].completed:
            try:
                requests.popleft().check_error()
            except UCXError as exc:
                error: Exception = exc
                return error
            if self.on_arrival is not None:
                self.on_arrival(self._num_posted - len(requests) - 1)
        return None

    def _request(self, endpoint: Any, buffer: Any, tag: int) -> Any:
        match self.kind:
            case Kind.SEND:
                return endpoint.stream_send(buffer)
            case Kind.RECEIVE:
                return endpoint.stream_recv(buffer)
            case Kind.SEND_BLOCKS:
                return endpoint.tag_send(buffer, Tag(tag))
            case Kind.RECEIVE_BLOCKS:
                return endpoint.tag_recv(buffer, Tag(tag), TagMaskFull)


class Link:
    """The engine thread's side of an endpoint.

    Attributes:
        unfinished: Operations that failed while some of their requests were still under way.
        is_open: Read by the event loop; everything else belongs to the engine thread.
    """

    __slots__ = ("endpoint", "is_open", "unfinished")

    def __init__(self, endpoint: Any) -> None:
        self.endpoint = endpoint
        self.is_open = True
        self.unfinished: list[Operation] = []

    def lost(self) -> None:
        """UCX says that the connection is gone."""
        self.is_open = False
