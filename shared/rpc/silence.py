"""Whether a worker that says nothing is still there.

An unanswered keepalive ping tells of a process that is stopped or cut off. It does not tell of one whose Python stands
still, because an event loop or a holder of the GIL does: gRPC's own threads answer pings beside it. A call does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import grpc

from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc

QUIET_S = 2.0
"""A worker that has said nothing for so long is asked."""
ANSWER_WITHIN_S = 5.0
"""Room for a crowded machine. Computing keeps nobody from answering, however long a step takes."""


async def until_unresponsive(worker: rpc.WorkerAsyncStub, heard_s: Callable[[], float]) -> str:
    """Asks for the worker's status whenever it is quiet, until it does not answer; then says so.

    Args:
        worker: Whom to ask.
        heard_s: When the worker last said something, or was last expected to say nothing, by `time.monotonic`.
    """
    while True:
        quiet_s = time.monotonic() - heard_s()
        if quiet_s < QUIET_S:
            await asyncio.sleep(QUIET_S - quiet_s)
            continue
        asked_s = time.monotonic()
        try:
            await worker.Status(pb.StatusRequest(), timeout=ANSWER_WITHIN_S)
        except grpc.aio.AioRpcError as exc:  # any other than this ends the stream as well
            if exc.code() is grpc.StatusCode.DEADLINE_EXCEEDED and heard_s() < asked_s:
                return f"has not answered for {time.monotonic() - asked_s:.1f} s"
        await asyncio.sleep(QUIET_S)
