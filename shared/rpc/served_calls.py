"""Many calls on one gRPC stream: the server's end, see `call_stream`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Generic, Literal, Protocol, TypeVar

import structlog

from shared.errors import Cancelled, InternalError, InvalidRequest, Overloaded, TandemError
from shared.settle import settle

log = structlog.get_logger(__name__)

RequestT = TypeVar("RequestT")
RequestT_co = TypeVar("RequestT_co", covariant=True)
ReplyT = TypeVar("ReplyT")
ReplyT_contra = TypeVar("ReplyT_contra", contravariant=True)
AnswerT = TypeVar("AnswerT")
AnswerT_co = TypeVar("AnswerT_co", covariant=True)

_MAX_REASON_CHARS = 1024


class Ask(Protocol[RequestT_co]):
    """A message from the caller; without a request the call of that number is given up."""

    number: int

    @property
    def request(self) -> RequestT_co: ...

    def HasField(self, field_name: Literal["request"], /) -> bool: ...  # noqa: N802 - the name is protobuf's


class MakeAnswer(Protocol[ReplyT_contra, AnswerT_co]):
    """A message to the caller."""

    def __call__(
        self, *, number: int, reply: ReplyT_contra | None = None, failed: str = "", reason: str = ""
    ) -> AnswerT_co: ...


class ServedCalls(Generic[RequestT, ReplyT, AnswerT]):
    """One stream.

    Args:
        serve: Serves one call to its end; is given the function that sends the reply.
        write: Of the stream.
        make_answer: Of its messages.
        limit: Calls that are open at once; a caller that has that many refused ones under way as well loses its stream.
    """

    def __init__(
        self,
        serve: Callable[[RequestT, Callable[[ReplyT], Awaitable[None]]], Awaitable[None]],
        write: Callable[[AnswerT], Awaitable[None]],
        make_answer: MakeAnswer[ReplyT, AnswerT],
        *,
        limit: int,
    ) -> None:
        self._serve = serve
        self._write = write
        self._make_answer = make_answer
        self._limit = 2 * limit
        self._running: dict[int, asyncio.Task[None]] = {}
        self._answers: asyncio.Queue[AnswerT] = asyncio.Queue()

    async def run(self, asks: AsyncIterator[Ask[RequestT]]) -> None:
        """Serves until the caller ends the stream; on return, and if cancelled, every call has ended.

        Raises:
            InvalidRequest, Overloaded: The caller does not keep to the rules.
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

    def _take(self, ask: Ask[RequestT]) -> None:
        number = ask.number
        if not ask.HasField("request"):
            if number in self._running:
                self._running[number].cancel()
            return
        if number in self._running:
            raise InvalidRequest(f"call {number} is open already")
        if len(self._running) + self._answers.qsize() >= self._limit:
            raise Overloaded(f"{self._limit} calls and answers on one stream")
        task = asyncio.create_task(self._run_one(number, ask.request))
        self._running[number] = task
        task.add_done_callback(lambda _: self._running.pop(number, None))

    async def _run_one(self, number: int, request: RequestT) -> None:
        async def reply(first: ReplyT) -> None:
            self._answers.put_nowait(self._make_answer(number=number, reply=first))

        try:
            await self._serve(request, reply)
        except TandemError as exc:
            self._fail(number, exc.code, exc.message)
        except asyncio.CancelledError:  # perhaps not by its caller, who would wait for ever
            self._fail(number, Cancelled.code, "")
            raise
        except Exception:
            log.exception("call_failed", number=number)
            self._fail(number, InternalError.code, "see its log")

    def _fail(self, number: int, code: str, reason: str) -> None:
        self._answers.put_nowait(self._make_answer(number=number, failed=code, reason=reason[:_MAX_REASON_CHARS]))

    async def _write_answers(self) -> None:
        while True:
            await self._write(await self._answers.get())
