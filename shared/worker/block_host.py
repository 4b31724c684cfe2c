"""Serves the worker's sealed blocks to its own kv_transfer: `Pin` holds them exactly while the call is open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc

from protos import kv_transfer_pb2 as pb
from protos import kv_transfer_pb2_grpc as rpc
from shared.engine.engine import Engine
from shared.errors import InvalidRequest
from shared.identity import split_hashes


class BlockHostServicer(rpc.BlockHostServicer):
    """The pin is a call: whoever asked goes away, for whatever reason, and the pin goes with it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def Pin(  # noqa: N802 - the name is gRPC's
        self, request: pb.PinRequest, context: grpc.aio.ServicerContext[pb.PinRequest, pb.PinReply]
    ) -> AsyncIterator[pb.PinReply]:
        """One reply, then the stream stays open; its end unpins."""
        try:
            hashes = split_hashes(request.block_hashes)
        except ValueError as exc:
            raise InvalidRequest(str(exc), param="block_hashes") from exc
        block_ids = self._engine.pin(hashes)
        try:
            yield pb.PinReply(block_ids=block_ids)
            await asyncio.Event().wait()  # until the caller cancels or its connection dies
        finally:
            self._engine.unpin([block_id for block_id in block_ids if block_id >= 0])
