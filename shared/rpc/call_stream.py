"""Many calls on one gRPC stream: the caller's end, see `served_calls` for the other.

A call of gRPC's own costs several times what a message on an open stream does.

    caller                                       server
       | -- number, request --------------------> |
       | <------------------ number, reply ------ |
       | -- number (only if given up early) ----> |  it is cancelled
       | <-- number, error (only if it failed) -- |

The end of the stream, for whatever reason, ends every call on it. gRPC lets one message at a time be written, and takes
a write that is cancelled for the end of the stream: so messages leave through a queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, Protocol, TypeVar

import grpc

from shared.errors import TandemError, WorkerLost, error_from_code
from shared.rpc.status import error_from_rpc

RequestT = TypeVar("RequestT")
RequestT_contra = TypeVar("RequestT_contra", contravariant=True)
ReplyT = TypeVar("ReplyT")
ReplyT_co = TypeVar("ReplyT_co", covariant=True)
AskT = TypeVar("AskT")
AskT_co = TypeVar("AskT_co", covariant=True)


class MakeAsk(Protocol[RequestT_contra, AskT_co]):
    """A message to the server; without a request the call of that number is given up."""

    def __call__(self, *, number: int, request: RequestT_contra | None = None) -> AskT_co: ...


class Answer(Protocol[ReplyT_co]):
    """A message from the server.

    Attributes:
        failed: "" or the code of the error that ended the call.
        reason: For the log.
    """

    number: int
    failed: str
    reason: str

    @property
    def reply(self) -> ReplyT_co: ...


class OpenCall(Generic[ReplyT]):
    """One call, as its caller sees it."""

    def __init__(self) -> None:
        self._reply: asyncio.Future[ReplyT] = asyncio.get_running_loop().create_future()

    async def reply(self) -> ReplyT:
        """The server's first word.

        Raises:
            TandemError: The call failed, or the server is gone.
        """
        return await self._reply

    def take(self, answer: Answer[ReplyT]) -> None:
        """What the server says."""
        if answer.failed:
            self.fail(error_from_code(answer.failed, answer.reason))
        elif not self._reply.done():
            self._reply.set_result(answer.reply)

    def fail(self, error: TandemError) -> None:
        """The server does nothing more for it."""
        if not self._reply.done():
            self._reply.set_exception(error)
            self._reply.exception()  # its caller may have gone


AnswerT = TypeVar("AnswerT", bound=Answer[Any])
CallT = TypeVar("CallT", bound=OpenCall[Any])


class CallStream(Generic[RequestT, AskT, AnswerT, CallT]):
    """One stream, opened at once; whoever made it closes it, before its channel.

    Args:
        stream: gRPC's.
        make_ask: Of its messages.
        make_call: Keeps what the server says to one call.
        server: What it is to the caller, for errors.

    Attributes:
        is_over: It ended; whoever wants to call needs another.
    """

    def __init__(
        self,
        stream: grpc.aio.StreamStreamCall[AskT, AnswerT],
        make_ask: MakeAsk[RequestT, AskT],
        make_call: Callable[[], CallT],
        *,
        server: str,
    ) -> None:
        self.is_over = False
        self._is_retired = False
        self._stream = stream
        self._make_ask = make_ask
        self._make_call = make_call
        self._server = server
        self._asks: asyncio.Queue[AskT] = asyncio.Queue()
        self._open: dict[int, CallT] = {}
        self._numbers = itertools.count(1)
        self._reading = asyncio.create_task(self._read())
        self._writing = asyncio.create_task(self._write())

    @contextlib.asynccontextmanager
    async def call(self, request: RequestT) -> AsyncIterator[CallT]:
        """Asks the server; leaving the context with an exception gives the call up."""
        number, call = next(self._numbers), self._make_call()
        if self.is_over:
            call.fail(WorkerLost(f"the stream to {self._server} has ended"))
        self._open[number] = call
        self._asks.put_nowait(self._make_ask(number=number, request=request))
        try:
            yield call
        except BaseException:
            self._asks.put_nowait(self._make_ask(number=number))
            raise
        finally:
            del self._open[number]
            if self._is_retired and not self._open:
                self.close()

    def retire(self) -> None:
        """No more calls come; ends after the last one."""
        self._is_retired = True
        if not self._open:
            self.close()

    def close(self) -> None:
        """Ends the stream, and every call on it."""
        self._stream.cancel()

    async def _read(self) -> None:
        error: TandemError = WorkerLost(f"{self._server} ended the stream")
        try:
            async for answer in self._stream:
                if answer.number in self._open:
                    self._open[answer.number].take(answer)
        except grpc.aio.AioRpcError as exc:
            error = error_from_rpc(exc)
        except asyncio.CancelledError:  # how gRPC says that this side ended it
            error = WorkerLost(f"the stream to {self._server} was closed")
        finally:
            self.is_over = True
            self._writing.cancel()
            self._stream.cancel()
            for call in self._open.values():
                call.fail(error)

    async def _write(self) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # `_read` hears of it, too
            while True:
                await self._stream.write(await self._asks.get())
