"""Serves `Worker.Embed` of an encoder.

Gateways keep their `Generate` stream open here too: by it they see whether a worker is there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc

from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from services.decode.encoder.queue import EncoderPooling, EncoderQueue
from services.decode.greeting import check_hello
from shared.errors import InvalidRequest, WorkerDraining
from shared.worker.embedding import check_embed, embed_reply
from shared.worker.status import WorkerStatus

_POOLINGS = {pb.POOLING_CLS: EncoderPooling.CLS, pb.POOLING_MEAN: EncoderPooling.MEAN}


class EncoderServicer(rpc.WorkerServicer):
    """Embeds; refuses every generation with the reason."""

    def __init__(self, queue: EncoderQueue, status: WorkerStatus) -> None:
        self._queue = queue
        self._status = status
        self._leaving = asyncio.Event()

    async def Status(  # noqa: N802
        self, request: pb.StatusRequest, context: grpc.aio.ServicerContext[pb.StatusRequest, pb.StatusReply]
    ) -> pb.StatusReply:
        """How this process stands."""
        return self._status.reply()

    async def Embed(  # noqa: N802
        self, request: pb.EmbedRequest, context: grpc.aio.ServicerContext[pb.EmbedRequest, pb.EmbedReply]
    ) -> pb.EmbedReply:
        """Vectors of inputs."""
        who = self._status.identity
        check_embed(request, who)
        if self._status.is_draining:
            raise WorkerDraining(f"worker {who.worker_id} is draining")
        pooling = _POOLINGS.get(request.pooling)
        if pooling is None:
            raise InvalidRequest(f"an encoder pools cls or the mean, not {pb.Pooling.Name(request.pooling)}")
        inputs = [list(item.token_ids) for item in request.inputs]
        return embed_reply(await self._queue.encode(inputs, pooling, request.priority), request)

    async def Generate(  # noqa: N802
        self,
        request_iterator: AsyncIterator[pb.GenerateCommand],
        context: grpc.aio.ServicerContext[pb.GenerateCommand, pb.StepOutput],
    ) -> AsyncIterator[pb.StepOutput]:
        """One gateway's stream, open for as long as this worker serves; whatever is submitted fails."""
        try:
            check_hello(await anext(request_iterator), self._status.identity)
        except StopAsyncIteration:
            return
        yield pb.StepOutput()  # tells the gateway that it was accepted
        leaving = asyncio.create_task(self._leaving.wait())
        try:
            while (command := await _next_command(request_iterator, leaving)) is not None:
                if command.WhichOneof("command") == "submit":
                    yield pb.StepOutput(failures=[self._refusal(command.submit.session_id)])
        finally:
            leaving.cancel()

    async def Prefill(  # noqa: N802
        self, request: pb.PrefillRequest, context: grpc.aio.ServicerContext[pb.PrefillRequest, pb.PrefillProgress]
    ) -> AsyncIterator[pb.PrefillProgress]:
        """Refused: there is no KV to compute."""
        nothing: list[pb.PrefillProgress] = []
        for progress in nothing:  # a function without a yield would be no stream
            yield progress
        raise InvalidRequest(self._reason())

    def end_calls(self) -> None:
        """Ends the gateways' streams."""
        self._leaving.set()

    def _refusal(self, session_id: str) -> pb.Failure:
        return pb.Failure(session_id=session_id, code=InvalidRequest.code, message=self._reason())

    def _reason(self) -> str:
        return f"the model {self._status.identity.model!r} embeds texts and generates none"


async def _next_command(
    commands: AsyncIterator[pb.GenerateCommand], leaving: asyncio.Task[bool]
) -> pb.GenerateCommand | None:
    """None when the gateway ended its side, or this worker leaves."""
    reading = asyncio.ensure_future(anext(commands, None))
    try:
        await asyncio.wait({reading, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return reading.result() if reading.done() else None
    finally:
        reading.cancel()
