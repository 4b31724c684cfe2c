"""A fetch on the stream to its holder, as the puller sees it.

An open call is a grant as well: while it stands the blocks come over UCX.

    puller                                     holder
       | -- number, request --------------------> |  pins
       | <-------------- number, first reply ---- |  then the blocks come over UCX
       | -- number (only if given up early) ----> |  unpins; else it does so once all is sent
       | <-- number, error (only if broken off) - |
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import grpc

from protos import kv_transfer_pb2 as pb
from protos import kv_transfer_pb2_grpc as rpc
from shared.cancellation import is_being_cancelled
from shared.errors import TandemError, WorkerLost, error_from_code
from shared.rpc.call_stream import CallStream, OpenCall

T = TypeVar("T")


class OpenFetch(OpenCall[pb.FetchReply]):
    """One fetch, as its caller sees it."""

    def __init__(self) -> None:
        super().__init__()
        self._receiving: asyncio.Task[Any] | None = None
        self._error: TandemError | None = None

    async def first_reply(self) -> pb.FetchReply:
        """The grant, or what is in its place.

        Raises:
            TandemError: The holder refused, or is gone.
        """
        reply = await self.reply()
        if reply.refused:
            raise error_from_code(reply.refused, "refused by the holder")
        return reply

    async def while_granted(self, receive: Coroutine[None, None, T]) -> T:
        """Receives as long as the grant stands; on return, in whatever way, `receive` has ended.

        The stream's keepalive notices a holder that hangs or is cut off, which the data plane does not.

        Raises:
            WorkerLost: The holder ended it, or is gone.
        """
        receiving = asyncio.ensure_future(receive)
        if self._error is not None:
            receiving.cancel()
        self._receiving = receiving
        try:
            return await receiving
        except asyncio.CancelledError as exc:
            if self._error is None or is_being_cancelled():
                raise
            raise WorkerLost(f"the holder ended the grant: {self._error.code}: {self._error.message}") from exc
        finally:
            self._receiving = None

    def fail(self, error: TandemError) -> None:
        """The holder will not send the rest."""
        self._error = error
        super().fail(error)
        if self._receiving is not None:
            self._receiving.cancel()


class FetchStream(CallStream[pb.FetchRequest, pb.FetchAsk, pb.FetchAnswer, OpenFetch]):
    """The puller's end; its calls are fetches."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        super().__init__(rpc.KvFetchStub(channel).Fetches(), pb.FetchAsk, OpenFetch, server="the holder")
        self.channel = channel
