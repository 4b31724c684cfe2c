"""Many fetches on one gRPC stream, both ends of it. A call costs several times what a message on an open stream does.

    puller                                     holder
       | -- number, request --------------------> |  pins
       | <-------------- number, first reply ---- |  then the blocks come over UCX
       | -- number (only if given up early) ----> |  unpins; else it does so once all is sent
       | <-- number, error (only if broken off) - |

The end of the stream, for whatever reason, ends every fetch on it. gRPC lets one message at a time be written, and
takes a write that is cancelled for the end of the call: so messages leave through a queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import grpc
import structlog

from protos import kv_transfer_pb2 as pb
from protos import kv_transfer_pb2_grpc as rpc
from shared.cancellation import is_being_cancelled
from shared.errors import InternalError, InvalidRequest, Overloaded, TandemError, WorkerLost, error_from_code
from shared.rpc import error_from_rpc
from shared.transfer.settle import settle

log = structlog.get_logger(__name__)

T = TypeVar("T")

_MAX_REASON_CHARS = 1024


class ServedFetches:
    """The holder's end of one stream.

    Args:
        serve: Serves one fetch to its end; is given the function that sends the first reply.
        write: Of the stream.
        limit: Fetches that are open at once; a peer that has that many refused ones under way as well loses its stream.
    """

    def __init__(
        self,
        serve: Callable[[pb.FetchRequest, Callable[[pb.FetchReply], Awaitable[None]]], Awaitable[None]],
        write: Callable[[pb.FetchAnswer], Awaitable[None]],
        *,
        limit: int,
    ) -> None:
        self._serve = serve
        self._write = write
        self._limit = 2 * limit
        self._running: dict[int, asyncio.Task[None]] = {}
        self._answers: asyncio.Queue[pb.FetchAnswer] = asyncio.Queue()

    async def run(self, asks: AsyncIterator[pb.FetchAsk]) -> None:
        """Serves until the peer ends the stream; on return, and if cancelled, every fetch has ended.

        Raises:
            InvalidRequest, Overloaded: The peer does not keep to the rules.
        """
        writing = asyncio.create_task(self._write_answers())
        try:
            async for ask in asks:
                self._take(ask)
        finally:
            tasks = [*self._running.values(), writing]
            for task in tasks:
                task.cancel()
            await settle(asyncio.wait(tasks))

    def _take(self, ask: pb.FetchAsk) -> None:
        number = ask.number
        if not ask.HasField("request"):
            if number in self._running:
                self._running[number].cancel()
            return
        if number in self._running:
            raise InvalidRequest(f"fetch {number} is open already")
        if len(self._running) + self._answers.qsize() >= self._limit:
            raise Overloaded(f"{self._limit} fetches and answers on one stream")
        task = asyncio.create_task(self._run_one(number, ask.request))
        self._running[number] = task
        task.add_done_callback(lambda _: self._running.pop(number, None))

    async def _run_one(self, number: int, request: pb.FetchRequest) -> None:
        async def reply(first: pb.FetchReply) -> None:
            self._answers.put_nowait(pb.FetchAnswer(number=number, reply=first))

        try:
            await self._serve(request, reply)
        except TandemError as exc:
            answer = pb.FetchAnswer(number=number, failed=exc.code, reason=exc.message[:_MAX_REASON_CHARS])
            self._answers.put_nowait(answer)
        except Exception:
            log.exception("fetch_failed", session_id=request.session_id)
            self._answers.put_nowait(pb.FetchAnswer(number=number, failed=InternalError.code, reason="see its log"))

    async def _write_answers(self) -> None:
        while True:
            await self._write(await self._answers.get())


class OpenFetch:
    """One fetch, as its caller sees it."""

    def __init__(self) -> None:
        self._reply: asyncio.Future[pb.FetchReply] = asyncio.get_running_loop().create_future()
        self._receiving: asyncio.Task[Any] | None = None
        self._error: TandemError | None = None

    async def first_reply(self) -> pb.FetchReply:
        """The grant, or what is in its place.

        Raises:
            TandemError: The holder refused, or is gone.
        """
        reply = await self._reply
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

    def take(self, answer: pb.FetchAnswer) -> None:
        """What the holder says."""
        if answer.failed:
            self.fail(error_from_code(answer.failed, answer.reason))
        elif not self._reply.done():
            self._reply.set_result(answer.reply)

    def fail(self, error: TandemError) -> None:
        """The holder will not send the rest."""
        self._error = error
        if not self._reply.done():
            self._reply.set_exception(error)
            self._reply.exception()  # its caller may have gone
        if self._receiving is not None:
            self._receiving.cancel()


class FetchStream:
    """The puller's end of one stream, opened at once; whoever made it closes it, before its channel.

    Attributes:
        is_over: It ended; whoever wants to fetch needs another.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.is_over = False
        self._is_retired = False
        self._call = rpc.KvFetchStub(channel).Fetches()
        self._asks: asyncio.Queue[pb.FetchAsk] = asyncio.Queue()
        self._open: dict[int, OpenFetch] = {}
        self._numbers = itertools.count(1)
        self._reading = asyncio.create_task(self._read())
        self._writing = asyncio.create_task(self._write())

    @contextlib.asynccontextmanager
    async def fetch(self, request: pb.FetchRequest) -> AsyncIterator[OpenFetch]:
        """Asks the holder; leaving the context with an exception gives the fetch up."""
        number, fetch = next(self._numbers), OpenFetch()
        self._open[number] = fetch
        self._asks.put_nowait(pb.FetchAsk(number=number, request=request))
        try:
            yield fetch
        except BaseException:
            self._asks.put_nowait(pb.FetchAsk(number=number))
            raise
        finally:
            del self._open[number]
            if self._is_retired and not self._open:
                self.close()

    def retire(self) -> None:
        """No more fetches come; ends after the last one."""
        self._is_retired = True
        if not self._open:
            self.close()

    def close(self) -> None:
        """Ends the stream, and every fetch on it."""
        self._call.cancel()

    async def _read(self) -> None:
        error: TandemError = WorkerLost("the holder ended the stream")
        try:
            async for answer in self._call:
                if answer.number in self._open:
                    self._open[answer.number].take(answer)
        except grpc.aio.AioRpcError as exc:
            error = error_from_rpc(exc)
        except asyncio.CancelledError:  # how gRPC says that this side ended it
            error = WorkerLost("the holder left the directory")
        finally:
            self.is_over = True
            self._writing.cancel()
            self._call.cancel()
            for fetch in self._open.values():
                fetch.fail(error)

    async def _write(self) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # `_read` hears of it, too
            while True:
                await self._call.write(await self._asks.get())
