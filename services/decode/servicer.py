"""Serves `Worker.Generate` to gateways.

Before it: services/gateway placed the request here. After it: `session` gets the prompt's KV, the engine generates.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import grpc
import structlog

from protos import worker_pb2 as pb
from services.decode.embedder import Embedder
from services.decode.gateway_stream import GatewayStream
from services.decode.routes import Routes, StepReader
from shared.engine.step import StepOutputs
from shared.errors import InternalError
from shared.worker.drain import RoleServicer
from shared.worker.process import WorkerParts

log = structlog.get_logger(__name__)


class DecodeServicer(RoleServicer):
    """Hands each step's outputs to the streams they belong to, in one pass."""

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts
        self._routes: Routes = {}
        self._streams: set[GatewayStream] = set()
        self._embedder = Embedder(parts)
        parts.dispatch.add_listener(self._on_step)

    async def Status(  # noqa: N802
        self, request: pb.StatusRequest, context: grpc.aio.ServicerContext[pb.StatusRequest, pb.StatusReply]
    ) -> pb.StatusReply:
        """How this process stands."""
        return self._parts.status.reply()

    async def Embed(  # noqa: N802
        self, request: pb.EmbedRequest, context: grpc.aio.ServicerContext[pb.EmbedRequest, pb.EmbedReply]
    ) -> pb.EmbedReply:
        """Vectors of inputs."""
        return await self._embedder.embed(request)

    async def Generate(  # noqa: N802
        self,
        request_iterator: AsyncIterator[pb.GenerateCommand],
        context: grpc.aio.ServicerContext[pb.GenerateCommand, pb.StepOutput],
    ) -> AsyncIterator[pb.StepOutput]:
        """One gateway's stream; its end, for whatever reason, aborts its sessions."""
        stream = GatewayStream(self._parts, self._routes)
        try:
            stream.greet(await anext(request_iterator))
        except StopAsyncIteration:
            return
        log.info("gateway_connected", gateway_id=stream.gateway_id)
        self._streams.add(stream)
        yield pb.StepOutput()  # tells the gateway that it was accepted
        reader = asyncio.create_task(stream.read(request_iterator))
        try:
            async for message in stream.messages():
                yield message
        finally:
            self._streams.discard(stream)
            reader.cancel()
            stream.close()
            log.info("gateway_disconnected", gateway_id=stream.gateway_id)

    def hand_back(self) -> int:
        """Gives every session back to its gateway; returns how many there were."""
        return sum(stream.hand_back() for stream in self._streams)

    def end_calls(self) -> None:
        """Ends the gateways' streams as soon as everything was sent."""
        for stream in self._streams:
            stream.end()

    def _on_step(self, outputs: StepOutputs) -> None:
        routes = self._routes
        touched: dict[StepReader, None] = {}
        for scores in outputs.prompt_scores:
            if route := routes.get(scores.sequence.sequence_id):
                stream, session = route
                stream.add_prompt_scores(session, scores)
                touched[stream] = None
        for sequence, token_id, logprobs in outputs.tokens:
            if route := routes.get(sequence.sequence_id):
                stream, session = route
                session.first_token_s = session.first_token_s or time.monotonic()
                try:
                    stream.add_token(session, sequence, token_id, logprobs)
                except InternalError as exc:
                    log.exception("session_broken", session_id=session.session_id)
                    stream.fail(session, exc)
                    continue
                touched[stream] = None
        for sequence in outputs.finished:
            if route := routes.get(sequence.sequence_id):
                stream, session = route
                stream.add_finish(session, sequence)
                touched[stream] = None
        for stream in touched:
            stream.flush()
